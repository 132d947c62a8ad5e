"""Causal language models of transformers, loaded from local safetensors only."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from morebench.config.compose import load_shape
from morebench.config.schema import LLM
from morebench.errors import ConfigError, WeightsError, join_problems
from morebench.models.attention import VARLEN
from morebench.models.stored import StoredTensors, parameters_on_meta, weight_files
from morebench.models.vision_names import unknown
from morebench.models.weights import is_lfs_pointer

# Starting values and bookkeeping: they change nothing once weights are loaded.
_WITHOUT_EFFECT = {"initializer_range", "use_cache", "pretraining_tp", "rope_theta", "rope_scaling"}
_WITHOUT_EFFECT |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
# Fields that transformers folds into `rope_parameters`, whatever a published config.json calls them.
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
# Old Llama files hold them; they are computed.
_ROTARY_TABLE = "rotary_emb.inv_freq"


def llm_config(shape: Mapping[str, Any]) -> PretrainedConfig:
    """Ids of special tokens belong to the tokenizer: those the shape does not name stay None.

    transformers' defaults for them are the first model's of the family, often beyond a smaller vocabulary.
    Raises ConfigError for a shape that is none of a causal LM.
    """
    model_type = str(shape.get("model_type"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(unknown(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "no causal LM is a"))
    fields = {key: value for key, value in shape.items() if key != "model_type"}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        return AutoConfig.for_model(model_type, **{**special, **fields})
    except Exception as error:  # each of some hundred classes validates in its own way
        raise ConfigError(f"llm.shape is no {model_type}: {_last_line(error)}") from error


def load_llm(config: LLM, folder: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The LLM with packed attention. `folder` None: random weights of the shape.

    Raises ConfigError for a shape that nothing can be built from, WeightsError if the folder's config.json
    differs from the shape, or its tensors are not those of the LLM.
    """
    if folder is None:
        return _random_llm(config, dtype)
    _check_folder(config, folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=VARLEN,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"The weights in {folder} cannot be read: {_last_line(error)}") from error
    llm, report = loaded
    _check_keys(folder, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return _without_padding(llm)


def unread_llm(config: LLM, path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, StoredTensors]:
    """The LLM without values, its parameters on the meta device, and where the values are, by its names.

    So a model larger than a device can be sharded before any of it is read. `path`: a folder of starting
    weights, or a file that `save_parts` wrote. Raises what `load_llm` does; a head tied to the embeddings
    must not lie in the files a second time.
    """
    if path.is_dir():
        _check_folder(config, path)
    with parameters_on_meta():
        llm = _random_llm(config, dtype)
    stored = StoredTensors(weight_files(path) if path.is_dir() else [path])
    wanted = {name: tuple(value.shape) for name, value in llm.named_parameters()}
    found = {name: shape for name, shape in stored.shapes.items() if not name.endswith(_ROTARY_TABLE)}
    different = [
        (name, found[name], wanted[name])
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    _check_keys(path, wanted.keys() - found.keys(), found.keys() - wanted.keys(), different)
    return llm, stored


def _random_llm(config: LLM, dtype: torch.dtype) -> PreTrainedModel:
    expected = llm_config(load_shape(config.shape))
    try:
        llm = AutoModelForCausalLM.from_config(expected, dtype=dtype, attn_implementation=VARLEN)
    except Exception as error:  # as above
        raise ConfigError(f"No LLM can be built from llm.shape: {_last_line(error)}") from error
    return _without_padding(llm)


def _check_folder(config: LLM, folder: Path) -> None:
    where = f"conf/shapes/{config.shape}" if isinstance(config.shape, str) else "llm.shape"
    check_config(load_shape(config.shape), folder, where)
    check_files(folder)


def _check_keys(
    path: Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    problems = [f"{key}: missing" for key in sorted(missing)]
    problems += [f"{key}: in the files, but the LLM has no place for it" for key in sorted(unexpected)]
    problems += [
        f"{key}: {list(found)} in the files, {list(wanted)} in the LLM"
        for key, found, wanted in sorted(mismatched)
    ]
    if problems:
        raise WeightsError(join_problems([f"The weights in {path} do not fit their config.json:", *problems]))


def check_files(folder: Path) -> None:
    """Raises one WeightsError if there is no safetensors file, or a pointer of git-LFS stands for one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{folder} has no *.safetensors file. Only safetensors are read; convert it first."
        )
    if pointers := [path.name for path in [*files, *folder.glob("*.json")] if is_lfs_pointer(path)]:
        raise WeightsError(
            f"{folder}: {', '.join(pointers)} is a pointer of git-LFS, not the file. Run: git lfs pull"
        )


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
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each of some hundred classes validates in its own way
        raise WeightsError(f"{folder / 'config.json'} is no config: {_last_line(error)}") from error
    problems = [
        f"{field}: {where} says {wanted}, {folder / 'config.json'} says {got}"
        for field, wanted, got in shape_differences(shape, found)
    ]
    problems = problems or [
        f"{field}: not in {where}, so {wanted}; {folder / 'config.json'} says {got}"
        for field, wanted, got in _differences_beyond(shape, found)
    ]
    if problems:
        raise WeightsError(
            join_problems(
                [*problems, "Use the weights the shape describes, or give them a shape file of their own."]
            )
        )


def shape_differences(shape: Mapping[str, Any], found: PretrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, value in `shape`, value found) of every field of `shape` that `found` contradicts."""
    yield from _differences(
        shape, found, {"rope_parameters" if key in _ROPE_FIELDS else key for key in shape}
    )


def _differences_beyond(shape: Mapping[str, Any], found: PretrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """The same for fields of the architecture that the shape leaves to transformers' defaults."""
    if found.model_type != shape["model_type"]:
        return
    own = type(found)().to_dict().keys() - PretrainedConfig().to_dict().keys()
    named = {"rope_parameters" if key in _ROPE_FIELDS else key for key in shape}
    yield from _differences(shape, found, own - named - _WITHOUT_EFFECT)


def _differences(
    shape: Mapping[str, Any], found: PretrainedConfig, fields: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    expected = llm_config(shape)
    for field in sorted(fields):
        wanted, got = getattr(expected, field, None), getattr(found, field, None)
        if wanted != got:
            yield field, wanted, got


def load_tokenizer(config: LLM, folder: Path) -> PreTrainedTokenizerFast:
    """The folder's fast tokenizer with the config's pad token.

    Raises WeightsError if that token is missing or the tokenizer has more ids than the LLM has rows.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged or missing file leads to
        raise WeightsError(f"The tokenizer in {folder} cannot be read: {_last_line(error)}") from error
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


def _last_line(error: Exception) -> str:
    """The reason stands at the end of what transformers and its validators say."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
