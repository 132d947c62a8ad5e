"""Published checkpoints come in as runs: bit for bit, with nothing left over, or not at all."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_reference import TOWER, Published, write_tensors
from factories_vision import random_pixels
from torch import Tensor

from morebench import convert
from morebench.config.compose import compose_config, load_config
from morebench.config.schema import Config, Part, Precision, Step
from morebench.errors import ConfigError, WeightsError
from morebench.matrix import ledger
from morebench.matrix.imported import import_reference
from morebench.models.llm import load_tokenizer
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, load_part
from morebench.models.reference_config import config_problems
from morebench.models.weights import starting_weights

CELL = ["recipe=digits", "suite=digits", "finetune_data=digits", "pretrain_data=digits", "trainer=cpu"]
CELL += ["tracking=none"]
LLMS = ("llama_tiny", "gemma2_tiny", "phi_tiny")


def overrides(root: Path, llm: str = "llama_tiny", vision: str = "clip_tiny", *more: str) -> list[str]:
    return [f"llm={llm}", f"vision={vision}", *CELL, f"paths.root={root}", *more]


def imported(
    root: Path, source: Path, *more: str, llm: str = "llama_tiny", vision: str = "clip_tiny"
) -> Path:
    return import_reference(compose_config(overrides(root, llm, vision, *more)), source).folder


def loaded(folder: Path) -> MLLM:
    """As the evaluate step does it."""
    config = load_config(folder / "config.yaml")
    mllm = build_mllm(config, starting_weights(config), Precision.fp32)
    for part in (Part.projector, Part.llm):
        load_part(mllm, part, folder / f"{part.name}.safetensors")
    return mllm.eval()


@torch.no_grad()
def logits(mllm: MLLM) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = mllm.vision.image_size
    visual_IVD = mllm.encode_images(random_pixels(2, size, generator))
    ids = torch.randint(3, 260, (7,), generator=generator)
    embeds_TD = torch.cat([*visual_IVD, mllm.llm.get_input_embeddings()(ids)])
    hidden = mllm.llm.base_model(
        inputs_embeds=embeds_TD[None],
        position_ids=torch.arange(len(embeds_TD))[None],
        use_cache=False,
        cu_seqlens=[0, len(embeds_TD)],
    ).last_hidden_state[0]
    return mllm.logits(hidden)


@pytest.mark.parametrize(
    ("llm", "vision", "shards", "suffix"),
    [
        ("llama_tiny", "clip_tiny", 1, "safetensors"),
        ("llama_tiny", "dinov2_tiny", 2, "bin"),
        ("gemma2_tiny", "siglip_tiny", 3, "safetensors"),
        ("phi_tiny", "clip_tiny", 1, "bin"),
    ],
)
def test_an_imported_model_is_the_model_that_was_published(
    llm: str, vision: str, shards: int, suffix: str, tmp_path: Path
) -> None:
    published = Published(llm, vision)
    source = published.write(tmp_path / "source", shards, suffix)
    folder = imported(tmp_path, source, llm=llm, vision=vision)
    assert ledger.is_done(folder)
    assert torch.equal(logits(loaded(folder)), logits(published.mllm(tmp_path / "tower")))
    config = load_config(folder / "config.yaml")
    assert Path(str(config.vision.weights.folder)).parent == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = manifest["imported"]["keys"]["taken"]
    assert sum(counts.values()) == len(published.tensors)
    tokenizer = load_tokenizer(config.llm, folder / "llm")
    assert tokenizer("red seven").input_ids == published.tokenizer("red seven").input_ids


def test_the_tower_sees_what_transformers_sees(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    mllm = loaded(imported(tmp_path, published.write(tmp_path / "source")))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = published.tower(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(mllm.vision(pixels), states[-2][:, 1:], rtol=1e-5, atol=1e-5)


def test_importing_twice_finds_the_first_run(tmp_path: Path) -> None:
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source")
    composed = compose_config(overrides(tmp_path))
    first = import_reference(composed, source)
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = import_reference(composed, source)
    assert (first.is_new, second.is_new) == (True, False)
    assert second.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == times
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_moved_run_still_finds_its_weights(tmp_path: Path) -> None:
    folder = imported(tmp_path, Published("llama_tiny", "clip_tiny").write(tmp_path / "source"))
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere") / folder.name
    config = load_config(moved / "config.yaml")
    assert starting_weights(config) == {Part.llm: moved / "llm", Part.vision: moved / "vision"}
    loaded(moved)


def test_weights_are_on_the_disk_once_and_in_the_published_dtype(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    published.tensors = {name: value.half() for name, value in published.tensors.items()}
    folder = imported(tmp_path, published.write(tmp_path / "source"))
    assert (folder / "llm" / "model.safetensors").resolve() == folder / "llm.safetensors"
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors") if not path.is_symlink()]
    num_bytes = sum(value.numel() * 2 for value in published.tensors.values())
    assert num_bytes <= sum(sizes) < num_bytes + 100_000
    exact = published.tensors["model.norm.weight"].float()
    assert torch.equal(loaded(folder).llm.state_dict()["model.norm.weight"], exact)


@pytest.mark.parametrize("llm", LLMS)
def test_a_config_without_tie_word_embeddings_and_a_tied_head_both_load(llm: str, tmp_path: Path) -> None:
    published = Published(llm, "clip_tiny")
    del published.config["tie_word_embeddings"]
    if published.shape["tie_word_embeddings"]:
        published.tensors["lm_head.weight"] = published.tensors["model.embed_tokens.weight"]
    published.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = imported(tmp_path, published.write(tmp_path / "source"), llm=llm)
    assert torch.equal(logits(loaded(folder)), logits(published.mllm(tmp_path / "tower")))
    ignored = json.loads((folder / "manifest.json").read_text())["imported"]["keys"]["ignored"]
    assert sum(ignored.values()) == 1 + published.shape["tie_word_embeddings"]


def test_a_head_of_its_own_does_not_become_a_tied_one(tmp_path: Path) -> None:
    published = Published("gemma2_tiny", "clip_tiny")
    published.tensors["lm_head.weight"] = published.tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(WeightsError, match=r"lm_head.weight: differs from model.embed_tokens.weight"):
        imported(tmp_path, published.write(tmp_path / "source"), llm="gemma2_tiny")


def test_every_wrong_tensor_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    tensors = published.tensors
    wrong = {
        "model.layers.1.mlp.up_proj.weight": "missing",
        "model.mm_projector.2.bias": "missing",
        f"{TOWER}vision_model.encoder.layers.0.mlp.fc1.bias": "missing",
        "model.layers.9.mlp.up_proj.weight": "surplus",
        "model.mm_projector.4.weight": "surplus",
        f"{TOWER}vision_model.nose.weight": "surplus",
        "model.norm.weight": "shape [5]",
        "model.mm_projector.0.bias": "shape [5]",
        f"{TOWER}vision_model.post_layernorm.bias": "shape [5]",
    }
    for name, kind in wrong.items():
        if kind == "missing":
            del tensors[name]
        else:
            tensors[name] = torch.zeros(5)
    with pytest.raises(WeightsError) as caught:
        imported(tmp_path, published.write(tmp_path / "source"))
    lines = str(caught.value).splitlines()[1:]
    for name, kind in wrong.items():
        tail = name.removeprefix(f"{TOWER}vision_model.")
        assert sum(tail in line and kind in line for line in lines) == 1, (name, kind, lines)
    assert len(lines) == len(wrong)
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("config.json", '{"model_type": ["llava_llama"]}', "is none of a published checkpoint"),
        ("tokenizer.json", "{}", "cannot be read"),
    ],
)
def test_damaged_checkpoints_are_no_traceback(file: str, content: str, words: str, tmp_path: Path) -> None:
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source")
    (source / file).write_text(content)
    with pytest.raises(WeightsError, match=words):
        imported(tmp_path, source)
    assert not list((tmp_path / "runs").glob("*"))


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    with torch.no_grad():
        published.projector[0].bias[1] = float("nan")
    with pytest.raises(WeightsError, match=r"mm_projector\.0\.bias: holds NaN or infinite"):
        imported(tmp_path, published.write(tmp_path / "source"))


@pytest.fixture(scope="module")
def published_config() -> dict[str, Any]:
    return Published("llama_tiny", "clip_tiny").config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["hidden_size: the cell's llm has 128, config.json 64"]),
        ({"model_type": "llava_gemma"}, ["holds a gemma2, the llm is a llama"]),
        ({"model_type": "llava_mpt"}, ["llava_llama, llava_phi, llava_gemma", "llava_mpt"]),
        ({"mm_hidden_size": 384}, ["384", "clip_tiny with resolution=s2"]),
        ({"mm_vision_select_layer": -1}, ["mm_vision_select_layer: -1", "vision.feature_layer=-2"]),
        ({"mm_vision_select_feature": "cls_patch"}, ["only 'patch'"]),
        ({"mm_projector_type": "identity"}, ["linear or mlpNx_gelu", "identity"]),
        ({"mm_projector_type": "linear"}, ["projector.depth=2"]),
        ({"mm_patch_merge_type": "spatial_unpad"}, ["only 'flat'"]),
        ({"mm_use_im_start_end": True}, ["mm_use_im_start_end: only False"]),
        ({"image_aspect_ratio": "anyres"}, ["anyres is not modelled"]),
        ({"tokenizer_model_max_length": 2048}, ["Set stage.finetune.max_length=2048"]),
        ({"siglip": True}, ["siglip: True", "1 prefix tokens"]),
        ({"s2": True, "s2_scales": "56,112,168"}, ["scales [1, 2, 3]", "resolution=s2"]),
        ({"s2": True, "s2_scales": "big"}, ["expected sizes in pixels"]),
        ({"mm_projector_type": "linear", "siglip": True}, ["mm_projector_type", "siglip"]),
    ],
)
def test_a_config_that_contradicts_the_cell_is_refused(
    changes: dict[str, Any], words: list[str], published_config: dict[str, Any], tmp_path: Path
) -> None:
    config = compose_config(overrides(tmp_path)).config
    assert config_problems(published_config, config, Step.finetune) == []
    text = "\n".join(config_problems(published_config | changes, config, Step.finetune))
    for word in words:
        assert word in text


# What the two releases wrote, as far as it is read; the older one knows neither S2 nor rope_theta.
RELEASED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "LLaVA-1.5-7B": (
        ["llm=vicuna_7b", "vision=clip"],
        {
            "intermediate_size": 11008,
            "max_length": 4096,
            "max_position_embeddings": 4096,
            "mm_hidden_size": 1024,
            "mm_resampler_type": None,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "vocab_size": 32000,
        },
    ),
    "LLaVA-MORE-8B-SigLIP": (
        ["llm=llama31_8b", "vision=siglip"],
        {
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mm_hidden_size": 1152,
            "mm_patch_merge_type": "flat",
            "num_key_value_heads": 8,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "s2": False,
            "s2_scales": "336,672,1008",
            "siglip": True,
            "tokenizer_model_max_length": 4096,
            "vocab_size": 128256,
        },
    ),
}
RELEASED_BOTH = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava_llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_fits_its_cell(name: str) -> None:
    cell, own = RELEASED[name]
    assert config_problems(RELEASED_BOTH | own, compose_config(cell).config, Step.finetune) == []


def test_config_and_tensors_are_complained_about_together(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    published.config["mm_vision_select_feature"] = "cls_patch"
    del published.tensors["model.norm.weight"]
    with pytest.raises(WeightsError, match=r"(?s)mm_vision_select_feature.*model\.norm\.weight: missing"):
        imported(tmp_path, published.write(tmp_path / "source"))


def test_scales_that_do_not_divide_are_named(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny", num_scales=3)
    published.config |= {"s2": True, "s2_scales": "56,100,168"}
    with pytest.raises(WeightsError, match=r"multiples of the vision encoder's 56.*\[100\] are no multiples"):
        imported(tmp_path, published.write(tmp_path / "source"), "resolution=s2")


def test_s2_checkpoints_load(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny", num_scales=3)
    published.config |= {"s2": True, "s2_scales": "56,112,168"}
    folder = imported(tmp_path, published.write(tmp_path / "source"), "resolution=s2")
    assert loaded(folder).vision.image_size == 168


def test_another_llm_than_the_cells_is_refused_with_the_right_choice(tmp_path: Path) -> None:
    source = Published("gemma2_tiny", "clip_tiny").write(tmp_path / "source")
    with pytest.raises(WeightsError, match=r"llm choices of the checkpoint's shape: gemma2_tiny"):
        imported(tmp_path, source)


class Evil:
    """Unpickled in full, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was_here"
    published = Published("llama_tiny", "clip_tiny")
    source = published.write(tmp_path / "source", suffix="bin")
    torch.save({**published.tensors, "model.evil": Evil(trace)}, source / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        imported(tmp_path, source)
    assert not trace.exists()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        imported(tmp_path, source)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists(), "the file would have done harm"


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a folder"):
        imported(tmp_path, tmp_path / "nowhere")
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source", num_shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    (source / "config.json").unlink()
    with pytest.raises(WeightsError) as caught:
        imported(tmp_path, source)
    assert "no config.json" in str(caught.value)
    assert "model-00002-of-00003.safetensors: named by" in str(caught.value)


def test_a_torn_file_is_one_error(tmp_path: Path) -> None:
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        imported(tmp_path, source)


def test_without_a_tower_the_choices_own_weights_are_needed(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    published.tensors = {name: t for name, t in published.tensors.items() if not name.startswith(TOWER)}
    source = published.write(tmp_path / "source")
    with pytest.raises(WeightsError, match=r"no vision tower, and the cell's: .* is not built yet"):
        imported(tmp_path, source)


def test_a_tokenizer_that_cannot_be_fast_is_named(tmp_path: Path) -> None:
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"Put the tokenizer\.json of the LLM"):
        imported(tmp_path, source)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_projector_alone_becomes_a_pretrain_run(suffix: str, tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    folder = imported(tmp_path, published.write_projector(tmp_path / "source", suffix))
    assert json.loads((folder / "manifest.json").read_text())["step"] == "pretrain"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["projector.safetensors"]
    config: Config = load_config(folder / "config.yaml")
    assert config.llm.weights == compose_config(overrides(tmp_path)).config.llm.weights


def test_a_projector_file_holds_nothing_else(tmp_path: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    source = published.write_projector(tmp_path / "source")
    write_tensors(
        {**published.projector_tensors(), "lm_head.weight": torch.zeros(3)}, source / "mm_projector.bin"
    )
    with pytest.raises(WeightsError, match=r"lm_head.weight: surplus"):
        imported(tmp_path, source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["from=reference path=DIR", "nothing"]),
        (["from=reference"], ["path=... is missing", "llm=... is missing", "vision=... is missing"]),
        (["from=llava", "path=x"], ["from=reference"]),
        (
            ["from=reference", "path=x", "llm=llama_tiny", "vision=clip_tiny", "stage=finetune"],
            ["stage=finetune"],
        ),
        (["from=reference", "path=x", "llm=lama_tiny", "vision=clip_tiny"], ["Did you mean llama_tiny?"]),
        (["from=reference", "path=x", "out=y", "llm=llama_tiny", "vision=clip_tiny"], ["out=y"]),
        (["to=transformers", "run=x"], ["out=... is missing"]),
    ],
)
def test_a_wrong_call_is_explained(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        convert.command(arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_command_prints_the_runs_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Published("llama_tiny", "clip_tiny").write(tmp_path / "source")
    convert.command(["from=reference", f"path={source}", *overrides(tmp_path)])
    shown = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    assert shown.out.strip() == folder.name
    assert "llm: 39 tensors" in shown.err
