"""Memory of a train step on one device that shards nothing, from the shape files alone: no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from morebench.config.schema import Config, Part
from morebench.models.flops import Count, Sizes, head_dim, llm_shape, sizes

# Trained: fp32 weight and gradient, AdamW's two fp32 moments; of matrices also the bf16 copy autocast makes.
_TRAINED, _AUTOCAST_COPY, _FROZEN = 16, 2, 2


@dataclass(frozen=True)
class _Kept:
    """Bytes that one block keeps for its backward pass, for each token and each unit of the widths named."""

    width: int  # hidden size
    attention: int  # query heads x head_dim
    groups: int  # key heads x head_dim
    mlp: int  # intermediate size
    token: int
    head: int  # query heads
    # a soft-cap on attention needs the matrix of scores: per pair of tokens, and per pair and head
    pair: int = 0
    pair_and_head: int = 0


# Counted with autograd's saved-tensor hooks under bf16 autocast; tests/test_memory.py repeats the count. A
# frozen linear layer keeps nothing, so frozen blocks keep less. (frozen, trained)
_LLAMA = (_Kept(8, 4, 4, 6, 8, 4), _Kept(26, 6, 4, 8, 8, 4))
_KEPT = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "phi3": (_Kept(8, 6, 6, 6, 8, 4), _Kept(26, 2, 6, 8, 8, 4)),
    "phi": (_Kept(2, 4, 4, 8, 4, 4), _Kept(12, 6, 4, 10, 8, 4)),
    "olmo2": (_Kept(8, 8, 8, 6, 16, 4), _Kept(26, 14, 12, 8, 16, 4)),
    "gemma2": (_Kept(16, 6, 0, 6, 16, 0, 1, 8), _Kept(42, 8, 0, 8, 16, 0, 1, 8)),
}


@dataclass(frozen=True)
class Memory(Generic[Count]):
    """Bytes. `state` is there all the time; `sample` is what one sample of a micro-batch adds."""

    state: int
    sample: Count


def is_counted(model_type: str) -> bool:
    """Whether `memory` knows what this model type keeps; others are taken for Llamas."""
    return model_type in _KEPT


def memory(
    config: Config, length: Count, num_images: Count, supervised: Count, trained: Collection[Part]
) -> Memory[Count]:
    """Of a train step: `length` counts visual tokens too. No block is computed twice (no recompute).

    The three counts may be int64 arrays, of many samples.
    """
    shape, model = llm_shape(config), sizes(config)
    return Memory(
        state=_state(shape, model, trained),
        sample=length * _kept_per_token(shape, length, Part.llm in trained)
        + _head(shape, model, supervised, Part.llm in trained)
        + num_images * model.num_visual_tokens * _projector(model),
    )


def _state(shape: Mapping[str, Any], model: Sizes, trained: Collection[Part]) -> int:
    head = model.llm_width * model.vocab_size
    embeddings = head if shape["tie_word_embeddings"] else 2 * head
    llm = (_TRAINED if Part.llm in trained else _FROZEN) * (model.llm_body + embeddings)
    if Part.llm in trained:
        llm += _AUTOCAST_COPY * (model.llm_body + head)
    projector = sum(model.projector)
    projector *= _TRAINED + _AUTOCAST_COPY if Part.projector in trained else _FROZEN
    return llm + projector + _FROZEN * model.vision_weights


def _kept_per_token(shape: Mapping[str, Any], length: Count, is_trained: bool) -> Count:
    kept = _KEPT.get(shape["model_type"], _LLAMA)[is_trained]
    heads, width = shape["num_attention_heads"], head_dim(shape)
    block = (
        kept.width * shape["hidden_size"]
        + kept.attention * heads * width
        + kept.groups * shape["num_key_value_heads"] * width
        + kept.mlp * shape["intermediate_size"]
        + kept.token
        + kept.head * heads
        + length * (kept.pair + kept.pair_and_head * heads)
    )
    # outside the blocks: the final norm, and cos and sin of the positions
    final_norm, rotary = (8, 8) if is_trained else (4, 4)
    return shape["num_hidden_layers"] * block + final_norm * shape["hidden_size"] + rotary * width


def _head(shape: Mapping[str, Any], model: Sizes, supervised: Count, is_trained: bool) -> Count:
    per_logit = 8 if shape.get("final_logit_softcapping") else 4  # log-probabilities; what the cap bent
    per_width = 2 if is_trained else 0
    return supervised * (per_logit * model.vocab_size + per_width * model.llm_width)


def _projector(model: Sizes) -> int:
    """Per visual token: the inputs of the linear layers and of the GELU between them, and what comes out."""
    vision_dim, hidden = model.projector[0] // model.llm_width, model.llm_width
    return 2 * (vision_dim + (2 * len(model.projector) - 1) * hidden)
