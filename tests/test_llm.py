import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_models import LLM_SHAPES, VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from morebench.config.compose import compose_config, load_shape
from morebench.config.schema import LLM
from morebench.errors import WeightsError
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config, load_llm, load_tokenizer


def choice(tmp_path: Path, shape: dict[str, Any]) -> LLM:
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    llm = compose_config(["llm=gemma2_tiny"]).config.llm
    return replace(llm, shape=str(tmp_path / "shape.json"), pad_token="<pad>")


def saved(shape: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llm_config(shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gemma2", "phi3", "llama", "phi"])
def test_loads_what_transformers_saved(family: str, tmp_path: Path) -> None:
    shape = LLM_SHAPES[family]
    folder = saved(shape, tmp_path / "llm")
    llm = load_llm(choice(tmp_path, shape), folder, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert llm.config._attn_implementation == VARLEN
    assert all(
        torch.equal(one, other) for one, other in zip(llm.parameters(), stock.parameters(), strict=True)
    )
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    assert tied == bool(shape.get("tie_word_embeddings"))


def test_dtype_is_given(tmp_path: Path) -> None:
    llm = load_llm(choice(tmp_path, LLM_SHAPES["gemma2"]), None, torch.bfloat16)
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}


def test_every_differing_field_is_named(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["gemma2"], tmp_path / "llm")
    wrong = LLM_SHAPES["gemma2"] | {"num_hidden_layers": 3, "sliding_window": 4096, "rope_theta": 5e5}
    with pytest.raises(WeightsError) as caught:
        load_llm(choice(tmp_path, wrong), folder, torch.float32)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "num_hidden_layers",
        "rope_parameters",
        "sliding_window",
    ]
    assert "says 3," in lines[0]
    assert "says 2" in lines[0]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    with pytest.raises(WeightsError, match=r"model_type: .* says gemma2, .* says llama"):
        load_llm(choice(tmp_path, LLM_SHAPES["gemma2"]), folder, torch.float32)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = saved(LLM_SHAPES["llama"], tmp_path / "llm")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        load_llm(choice(tmp_path, LLM_SHAPES["llama"]), folder, torch.float32)


def test_pad_token_comes_from_the_config(tmp_path: Path) -> None:
    core = Tokenizer(WordLevel({"a": 0, "<pad>": 1, "<eos>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path)
    config = choice(tmp_path, LLM_SHAPES["llama"])
    assert load_tokenizer(config, tmp_path).pad_token_id == 1
    with pytest.raises(WeightsError, match="'<nix>' is not in the vocabulary"):
        load_tokenizer(replace(config, pad_token="<nix>"), tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "llama", "phi3"])
@pytest.mark.parametrize("from_folder", [True, False])
def test_a_pad_token_in_the_text_learns_like_any_other(
    family: str, from_folder: bool, tmp_path: Path
) -> None:
    shape = LLM_SHAPES[family]
    folder = saved(shape, tmp_path / "llm") if from_folder else None
    llm = load_llm(choice(tmp_path, shape), folder, torch.float32)
    embeddings = llm.get_input_embeddings()
    embeddings(torch.tensor([shape["pad_token_id"], 3])).sum().backward()
    assert (embeddings.weight.grad.abs().sum(-1) > 0).nonzero().flatten().tolist() == [0, 3]


def saved_tokenizer(folder: Path, vocabulary: dict[str, int], **roles: str) -> Path:
    core = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, **roles).save_pretrained(folder)
    return folder


def test_a_missing_pad_token_names_what_there_is(tmp_path: Path) -> None:
    config = replace(choice(tmp_path, LLM_SHAPES["llama"]), pad_token="<nix>")
    words = {"a": 0, "<eos>": 1, "<|finetune_right_pad_id|>": 2, "<unk>": 3}
    folder = saved_tokenizer(tmp_path / "without", words, eos_token="<eos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(config, folder)
    message = str(caught.value)
    assert "llm.pad_token='<nix>' is not in the vocabulary" in message
    assert str(folder) in message
    assert "no pad token of its own; tokens that would do: '<|finetune_right_pad_id|>', '<unk>'." in message
    folder = saved_tokenizer(tmp_path / "with", words | {"<pad>": 4}, eos_token="<eos>", pad_token="<pad>")
    with pytest.raises(WeightsError, match="Its own pad token is '<pad>'; tokens that would do: '<pad>'"):
        load_tokenizer(config, folder)


def test_more_ids_than_rows_are_refused(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(1, VOCABULARY)} | {"a": VOCABULARY, "<pad>": 0}
    folder = saved_tokenizer(tmp_path / "more", words, pad_token="<pad>")
    with pytest.raises(WeightsError, match=r"has ids up to 50, Gemma-2-tiny only 50 embedding rows"):
        load_tokenizer(choice(tmp_path, LLM_SHAPES["gemma2"]), folder)


@pytest.mark.parametrize("family", ["phi3", "phi"])
def test_fewer_ids_than_rows_resize_nothing(family: str, tmp_path: Path) -> None:
    """As published: Phi-4-mini has 200,064 rows, Phi-2 51,200, both more than their tokenizers have ids."""
    config = choice(tmp_path, LLM_SHAPES[family])
    folder = saved_tokenizer(saved(LLM_SHAPES[family], tmp_path / "llm"), {"a": 0, "<pad>": 1})
    assert len(load_tokenizer(config, folder)) == 2
    llm = load_llm(config, folder, torch.float32)
    assert len(llm.get_input_embeddings().weight) == len(llm.get_output_embeddings().weight) == VOCABULARY


@pytest.mark.parametrize(
    ("stem", "billions"),
    [
        ("gemma2_2b", 2.02),
        ("gemma2_9b", 8.32),
        ("phi4", 3.22),
        ("llama31_8b", 6.98),
        ("llama3_8b", 6.98),
        ("deepseek_r1_llama_8b", 6.98),
        ("vicuna_7b", 6.48),
        ("phi2", 2.52),
    ],
)
def test_published_shapes_have_the_published_sizes(stem: str, billions: float) -> None:
    config = llm_config(load_shape(f"llm/{stem}.json"))
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    outside = {*llm.get_input_embeddings().parameters(), *llm.get_output_embeddings().parameters()}
    body = sum(parameter.numel() for parameter in llm.parameters() if parameter not in outside)
    assert round(body / 1e9, 2) == billions


def test_phi4_rotates_as_published() -> None:
    """48 factors a list (three quarters of a 128-wide head, in pairs); cos and sin grow at every length."""
    rope = load_shape("llm/phi4.json")["rope_scaling"]
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 48
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            llm_config(load_shape("llm/phi4.json") | {"num_hidden_layers": 1})
        )
    assert llm.base_model.rotary_emb.attention_scaling == pytest.approx(1.190, abs=5e-4)
