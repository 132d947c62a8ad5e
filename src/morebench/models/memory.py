"""Memory of a train step, from the shape files alone: no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic

from morebench.config.compose import load_shape
from morebench.config.schema import Attention, Config, Part, Strategy
from morebench.models.flops import Count, Sizes, head_dim, llm_shape, sizes

# Bytes per weight. Trained: fp32 weight and gradient, AdamW's two fp32 moments; of matrices also the bf16
# copy that is multiplied.
_MASTER, _GRADIENT, _MOMENTS, _COPY, _FROZEN = 4, 4, 8, 2, 2


@dataclass(frozen=True)
class _Kept:
    """Bytes that one block keeps for its backward pass, for each token and each unit of the widths named."""

    width: int  # hidden size
    attention: int  # query heads x head_dim
    groups: int  # key heads x head_dim
    mlp: int  # intermediate size
    token: int
    head: int  # query heads
    # the loop's soft-cap needs the matrix of scores: per pair of tokens, and per pair and head
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


# Of a recomputed block, per token and unit of the hidden size: fp32, as only trained LLMs are recomputed.
_BLOCK_INPUT = 4

# Of each colour of a pixel: as the workers make it, and in the encoder's bf16.
_COLOUR = 6


@dataclass(frozen=True)
class Memory(Generic[Count]):
    """Bytes. `state` is there all the time, here on a device that shards nothing; `sample` is what one sample
    of a micro-batch adds.
    """

    state: int
    sample: Count


def is_counted(model_type: str) -> bool:
    """Whether `memory` knows what this model type keeps; others are taken for Llamas."""
    return model_type in _KEPT


def memory(
    config: Config,
    length: Count,
    num_images: Count,
    supervised: Count,
    trained: Collection[Part],
    recomputed: int = 0,
    attention: Attention = Attention.loop,
) -> Memory[Count]:
    """Of a train step: `length` counts visual tokens too; `recomputed` blocks of the LLM are computed twice.

    Of `attention`, only the loop keeps the scores that a soft-cap bends; `auto` is taken for a kernel.
    The three counts may be int64 arrays, of many samples.
    """
    shape, model = llm_shape(config), sizes(config)
    return Memory(
        state=state_per_rank(config, trained, Strategy.auto, 1),
        sample=length * _kept_per_token(shape, length, Part.llm in trained, recomputed, attention)
        + _head(shape, model, supervised, Part.llm in trained)
        + num_images * model.num_visual_tokens * _projector(model),
    )


def image_bytes(config: Config) -> int:
    """Of one image's pixels, which no backward pass needs but which are there."""
    side = load_shape(config.vision.shape)["image_size"] * max(config.resolution.scales)
    return 3 * side**2 * _COLOUR


def state_per_rank(config: Config, trained: Collection[Part], strategy: Strategy, world_size: int) -> int:
    """Bytes of weights, gradients and AdamW's moments that are on every device all the time.

    Sharding strategies divide what belongs to projector and LLM; the vision encoder is never sharded. FSDP2
    and ZeRO-3 also hold what is gathered at one time: the root group (embeddings, head, projector) and two
    blocks, the one computed and the one fetched ahead.
    """
    shape, model = llm_shape(config), sizes(config)
    head = model.llm_width * model.vocab_size
    embeddings = head if shape["tie_word_embeddings"] else 2 * head
    # (weights, of which multiplied, trained)
    llm = (model.llm_body + embeddings, model.llm_body + head, Part.llm in trained)
    projector = (sum(model.projector), sum(model.projector), Part.projector in trained)
    vision = _FROZEN * model.vision_weights
    if strategy in (Strategy.fsdp2, Strategy.zero3):
        shards = [
            weights * (_MASTER + _GRADIENT + _MOMENTS if is_trained else _FROZEN)
            for weights, _, is_trained in (llm, projector)
        ]
        block = model.llm_body // model.llm_layers
        gathered = _COPY * (embeddings + sum(model.projector) + 2 * block)
        # whole until they are reduced, in the dtype they are reduced in
        gathered += _GRADIENT * ((embeddings + block) * llm[2] + sum(model.projector) * projector[2])
        return vision + gathered + -(-sum(shards) // world_size)
    state = vision
    for weights, multiplied, is_trained in (llm, projector):
        if not is_trained:
            state += _FROZEN * weights
        elif strategy is Strategy.zero2:  # whole to compute with, shared out for the optimizer
            state += _COPY * weights + -(-(_MASTER + _GRADIENT + _MOMENTS) * weights // world_size)
        else:
            state += (_MASTER + _GRADIENT + _MOMENTS) * weights + _COPY * multiplied
    return state


def _kept_per_token(
    shape: Mapping[str, Any], length: Count, is_trained: bool, recomputed: int, attention: Attention
) -> Count:
    kept = _KEPT.get(shape["model_type"], _LLAMA)[is_trained]
    if kept.pair_and_head and attention is not Attention.loop:
        # one kernel keeps queries, keys, values, output and log-sum-exp, with a soft-cap as without
        fused = _LLAMA[is_trained]
        kept = replace(
            kept, attention=fused.attention, groups=fused.groups, head=fused.head, pair=0, pair_and_head=0
        )
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
    outside = final_norm * shape["hidden_size"] + rotary * width
    whole = shape["num_hidden_layers"] - recomputed
    if not recomputed:
        return whole * block + outside
    # one block at a time is whole again in the backward pass; of the others only the input is there
    return (whole + 1) * block + recomputed * _BLOCK_INPUT * shape["hidden_size"] + outside


def _head(shape: Mapping[str, Any], model: Sizes, supervised: Count, is_trained: bool) -> Count:
    per_logit = 8 if shape.get("final_logit_softcapping") else 4  # log-probabilities; what the cap bent
    per_width = 2 if is_trained else 0
    return supervised * (per_logit * model.vocab_size + per_width * model.llm_width)


def _projector(model: Sizes) -> int:
    """Per visual token: the inputs of the linear layers and of the GELU between them, and what comes out."""
    vision_dim, hidden = model.projector[0] // model.llm_width, model.llm_width
    return 2 * (vision_dim + (2 * len(model.projector) - 1) * hidden)
