"""An LLM without values, and the files its pieces are read from."""

from pathlib import Path

import pytest
import torch
from factories_models import LLM_SHAPES
from safetensors.torch import load_file, save_file
from test_llm import choice, saved

from morebench.errors import WeightsError
from morebench.models.llm import load_llm, unread_llm
from morebench.models.stored import StoredTensors, weight_files

TENSORS = {"a": torch.arange(12.0).view(3, 2, 2), "b": torch.arange(5.0), "c": torch.tensor(7.0)}


@pytest.mark.parametrize("name", TENSORS)
def test_any_stretch_is_read(name: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t.safetensors")
    stored = StoredTensors([tmp_path / "t.safetensors"])
    flat = TENSORS[name].flatten()
    assert stored.shapes[name] == tuple(TENSORS[name].shape)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert torch.equal(stored.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize("family", ["gemma2", "phi3", "llama", "llama31"])
def test_an_unread_llm_is_the_read_one_without_values(family: str, tmp_path: Path) -> None:
    shape = LLM_SHAPES[family]
    folder, config = saved(shape, tmp_path / "llm"), choice(tmp_path, shape)
    llm, stored = unread_llm(config, folder, torch.float32)
    read = load_llm(config, folder, torch.float32)
    assert all(value.is_meta for value in llm.parameters())
    assert llm.get_input_embeddings().padding_idx is None
    wholes = dict(read.named_parameters())
    assert [name for name, _ in llm.named_parameters()] == list(wholes)  # a tied head once
    for name, value in llm.named_parameters():
        assert (value.shape, value.dtype) == (wholes[name].shape, wholes[name].dtype)
        assert torch.equal(stored.read(name, 0, value.numel()), wholes[name].detach().flatten())
    tables = dict(read.named_buffers())
    assert tables
    for name, table in llm.named_buffers():
        assert torch.equal(table, tables.pop(name))
    assert not tables


def test_all_that_does_not_fit_is_named(tmp_path: Path) -> None:
    shape = LLM_SHAPES["gemma2"]
    folder = saved(shape, tmp_path / "llm")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(2, 3)
    tensors["lm_head.weight"] = torch.zeros(1)  # the head is tied
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)  # of old files
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        unread_llm(choice(tmp_path, shape), folder, torch.float32)
    assert [line.split(":")[0].lstrip("- ") for line in str(caught.value).splitlines()[1:]] == [
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]


def test_the_config_is_checked(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    wrong = LLM_SHAPES["llama"] | {"num_hidden_layers": 3}
    with pytest.raises(WeightsError, match=r"num_hidden_layers: .* says 3"):
        unread_llm(choice(tmp_path, wrong), folder, torch.float32)


def test_files_are_those_of_the_index(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "1.safetensors"}}')
    (tmp_path / "consolidated.safetensors").touch()  # the same weights once more
    with pytest.raises(WeightsError, match=r"not there: 1\.safetensors, 2\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "1.safetensors").touch()
    (tmp_path / "2.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["1.safetensors", "2.safetensors"]
    index.write_text("[]")
    with pytest.raises(WeightsError, match="is no index"):
        weight_files(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        StoredTensors(weight_files(tmp_path))
