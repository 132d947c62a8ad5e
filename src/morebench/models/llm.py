"""Causal language models of transformers, loaded from local safetensors only."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from morebench.config.compose import load_shape
from morebench.config.schema import LLM
from morebench.errors import WeightsError, join_problems
from morebench.models.attention import VARLEN

# Fields that transformers folds into `rope_parameters`, whatever a published config.json calls them.
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}


def llm_config(shape: Mapping[str, Any]) -> PretrainedConfig:
    """Ids of special tokens belong to the tokenizer: those the shape does not name stay None.

    transformers' defaults for them are the first model's of the family, often beyond a smaller vocabulary.
    """
    fields = {key: value for key, value in shape.items() if key != "model_type"}
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoConfig.for_model(shape["model_type"], **{**unknown, **fields})


def load_llm(config: LLM, folder: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The LLM with packed attention. `folder` None: random weights of the shape.

    Raises WeightsError if the folder's config.json differs from the shape, or has no safetensors.
    """
    expected = llm_config(load_shape(config.shape))
    if folder is None:
        return _without_padding(
            AutoModelForCausalLM.from_config(expected, dtype=dtype, attn_implementation=VARLEN)
        )
    check_config(
        load_shape(config.shape),
        folder,
        f"conf/shapes/{config.shape}" if isinstance(config.shape, str) else "llm.shape",
    )
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} has no *.safetensors file. Only safetensors are read; convert it first."
        )
    llm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=VARLEN, use_safetensors=True, local_files_only=True
    )
    return _without_padding(llm)


def _without_padding(llm: PreTrainedModel) -> PreTrainedModel:
    """Batches are never padded, and transformers gives the row of a pad token no gradient.

    Where it is also the end mark, it stands between the turns and must learn.
    """
    embeddings = cast(nn.Embedding, llm.get_input_embeddings())
    embeddings.padding_idx = None
    return llm


def check_config(shape: Mapping[str, Any], folder: Path, where: str) -> None:
    """Raise one WeightsError that lists every field of `shape` that `folder`/config.json contradicts.

    `where` says where the shape stands.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json, so it is not a folder of transformers weights.")
    found = AutoConfig.from_pretrained(folder, local_files_only=True)
    problems = [
        f"{field}: {where} says {wanted}, {folder / 'config.json'} says {got}"
        for field, wanted, got in shape_differences(shape, found)
    ]
    if problems:
        raise WeightsError(
            join_problems(
                [*problems, "Use the weights the shape describes, or give them a shape file of their own."]
            )
        )


def shape_differences(shape: Mapping[str, Any], found: PretrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, value in `shape`, value found) of every field of `shape` that `found` contradicts."""
    expected = llm_config(shape)
    for field in sorted({"rope_parameters" if key in _ROPE_FIELDS else key for key in shape}):
        wanted, got = getattr(expected, field, None), getattr(found, field, None)
        if wanted != got:
            yield field, wanted, got


def load_tokenizer(config: LLM, folder: Path) -> PreTrainedTokenizerFast:
    """The folder's fast tokenizer with the config's pad token.

    Raises WeightsError if that token is missing or the tokenizer has more ids than the LLM has rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise WeightsError(
            f"{folder} has only a slow tokenizer ({type(tokenizer).__name__}); a fast one is needed."
        )
    vocabulary = tokenizer.get_vocab()
    if config.pad_token not in vocabulary:
        raise WeightsError(
            f"llm.pad_token={config.pad_token!r} is not in the vocabulary of the tokenizer in {folder}. "
            f"{_pads_there_are(tokenizer)}"
        )
    # Fewer ids than rows is usual (Phi-4, Phi-2: rounded up for speed); those rows have no text.
    rows, largest = load_shape(config.shape)["vocab_size"], max(vocabulary.values())
    if largest >= rows:
        raise WeightsError(
            f"The tokenizer in {folder} has ids up to {largest}, {config.label} only {rows} embedding rows "
            "(vocab_size of its shape). Tokenizer and weights belong to different models."
        )
    tokenizer.pad_token = config.pad_token
    return tokenizer


def _pads_there_are(tokenizer: PreTrainedTokenizerFast) -> str:
    own = tokenizer.pad_token
    owned = "It has no pad token of its own" if own is None else f"Its own pad token is {own!r}"
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    like = [token for token in added if re.search(r"pad|unk|end_?of_?text|reserved", token)][:8]
    return f"{owned}; tokens that would do: {', '.join(map(repr, like)) or 'none found'}."
