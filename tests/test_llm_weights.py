"""An LLM's folder must hold exactly the LLM that the shape describes, and says so when it does not."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_models import LLM_SHAPES
from safetensors.torch import load_file, save_file
from test_llm import choice, saved
from torch import Tensor

from morebench.errors import ConfigError, WeightsError
from morebench.models.llm import llm_config, load_llm, load_tokenizer

State = dict[str, Tensor]


def change(folder: Path, edit: Callable[[State], object]) -> Path:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(tmp_path: Path, folder: Path, family: str = "llama") -> None:
    load_llm(choice(tmp_path, LLM_SHAPES[family]), folder, torch.float32)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "reasons"),
    [
        (lambda state: state.pop(UP), [f"{UP}: missing"]),
        (lambda state: state.pop("lm_head.weight"), ["lm_head.weight: missing"]),
        (
            lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
            ["model.layers.2.mlp.up_proj.weight: in the files, but the LLM has no place for it"],
        ),
        (lambda state: state.update({UP: torch.zeros(7, 32)}), [f"{UP}: [7, 32] in the files, [48, 32]"]),
        (
            lambda state: (state.pop(UP), state.update({"model.extra": torch.zeros(1)})),
            [f"{UP}: missing", "model.extra: in the files"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(
    edit: Callable[[State], object], reasons: list[str], tmp_path: Path
) -> None:
    folder = change(saved(LLM_SHAPES["llama"], tmp_path / "llm"), edit)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, folder)
    assert len(str(caught.value).splitlines()) == 1 + len(reasons)
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_tied_head_need_not_be_there(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["gemma2"], tmp_path / "llm")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(tmp_path, folder, "gemma2")


@pytest.mark.parametrize(
    ("field", "value"), [("rms_norm_eps", 0.05), ("hidden_act", "gelu"), ("rope_theta", 77.0)]
)
def test_a_field_that_the_shape_leaves_out_must_be_the_default(
    field: str, value: object, tmp_path: Path
) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    if field == "rope_theta":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(WeightsError, match=r"not in .*shape.json, so .* says"):
        load(tmp_path, folder)


def test_starting_values_and_token_ids_do_not_matter(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    changes = {"initializer_range": 0.5, "use_cache": False, "torch_dtype": "float16", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(config | changes))
    load(tmp_path, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_says_what_to_do(name: str, tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match=r"git lfs pull|is no config"):
        load(tmp_path, folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", "cut"), ("config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", "[")],
)
def test_damaged_files_are_no_traceback(name: str, content: str, tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    (folder / name).write_text(content)
    read = (
        partial(load_tokenizer, choice(tmp_path, LLM_SHAPES["llama"]))
        if name.startswith("tok")
        else partial(load, tmp_path)
    )
    with pytest.raises(WeightsError, match=r"cannot be read|is no config"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "lama"}, "no causal LM is a 'lama'. Nearest: llama"),
        ({"model_type": None}, "no causal LM is a 'None'"),
        ({"hidden_size": "64x"}, "llm.shape is no llama"),
        ({"num_attention_heads": 5}, "llm.shape is no llama"),
    ],
)
def test_shapes_of_nothing_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm_config(LLM_SHAPES["llama"] | changes)
    assert reason in str(caught.value)


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_among_the_weights_does_not_run(tmp_path: Path) -> None:
    """Beside the safetensors it is not looked at, and without them it is no substitute."""
    trace = tmp_path / "was_here"
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Evil(trace)))
    load(tmp_path, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="Only safetensors are read"):
        load(tmp_path, folder)
    assert not trace.exists()
