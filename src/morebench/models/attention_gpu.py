"""Packed attention in one kernel a layer, for GPUs: flex_attention and varlen_attn of torch."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from morebench.config.schema import Attention
from morebench.models.attention import Attend, Loop

_BLOCK = 128  # tokens; what flex_attention is tuned for


def attend_with(kind: Attention, borders: Sequence[int], device: torch.device) -> Attend:
    """`borders`: of the samples of one batch, from 0 on. A pack of one block is not worth a kernel compiled
    for it: sizes of 1 are compiled apart.
    """
    if borders[-1] <= _BLOCK:
        return Loop(borders)
    if kind is Attention.flex:
        return Flex(borders, device)
    if kind is Attention.varlen:
        return Varlen(borders, device)
    return Loop(borders)


def attention_problem(
    kind: Attention, device: str, dtype: torch.dtype, softcap: float | None, head_dim: int
) -> str | None:
    """Why this kind cannot train an LLM, whose attention computes in `dtype`; None if it can."""
    if kind is Attention.loop:
        return None
    if device != "cuda":
        return f"it needs a GPU, and this run is on {device}: loop"
    if kind is Attention.flex:
        return None if head_dim >= 16 else f"it needs heads of 16 or more, not {head_dim}: loop"
    if softcap is not None:
        return f"it knows no soft-cap, and this LLM's attention has one of {softcap}: flex or loop"
    if dtype is not torch.bfloat16:
        return f"it computes in bf16, and the recipe's precision is {str(dtype).removeprefix('torch.')}: flex"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it: flex"
    return None


class Flex:
    """Block masks are made of the borders, without a T x T matrix, at the first layer that needs them."""

    def __init__(self, borders: Sequence[int], device: torch.device) -> None:
        self._longest = _longest(borders)
        lengths = torch.tensor(borders).diff()
        self._sample_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}

    def __call__(
        self,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        query_1HTK, key_1GTK = query_1HTK.to(value_1GTK.dtype), key_1GTK.to(value_1GTK.dtype)
        out_1HTK: Tensor = _flex(self._device.type)(
            query_1HTK,
            key_1GTK,
            value_1GTK,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self._mask(_effective(window, self._longest)),
            scale=scale,
            enable_gqa=query_1HTK.shape[1] != key_1GTK.shape[1],
        )
        return out_1HTK.transpose(1, 2)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = block_mask(self._sample_T, window, self._device)
        return self._masks[window]


class Varlen:
    def __init__(self, borders: Sequence[int], device: torch.device) -> None:
        self._longest = _longest(borders)
        self._cu_seqlens = torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True)

    def __call__(
        self,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        if softcap is not None:
            raise ValueError(f"varlen_attn knows no soft-cap; found {softcap}. Use flex or loop.")
        window = _effective(window, self._longest)
        # outside autocast's lists: rotary tables in fp32 leave queries and keys in fp32
        query_THK, key_TGK, value_TGK = (
            tensor[0].transpose(0, 1).to(value_1GTK.dtype) for tensor in (query_1HTK, key_1GTK, value_1GTK)
        )
        out_THK: Tensor = _varlen()(
            query_THK,
            key_TGK,
            value_TGK,
            self._cu_seqlens,
            self._cu_seqlens,
            self._longest,
            self._longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # positions before the query's own
            enable_gqa=query_THK.shape[1] != key_TGK.shape[1],
        )
        return out_THK[None]


def block_mask(sample_T: Tensor, window: int | None, device: torch.device) -> BlockMask:
    """Which 128 x 128 blocks a causal query may see, from the number of each token's sample (ascending).

    For key block j before query block i: samples are contiguous, so if any pair is of one sample, then the
    nearest pair is, the last key and the first query; and all pairs are, if the farthest one is.
    """
    length = len(sample_T)
    starts = torch.arange(0, length, _BLOCK)
    ends = (starts + _BLOCK).clamp(max=length) - 1
    before = starts[None, :] < starts[:, None]
    seen = before & (sample_T[ends][None, :] == sample_T[starts][:, None])
    full = before & (sample_T[starts][None, :] == sample_T[ends][:, None])
    if window is not None:
        seen &= starts[:, None] - ends[None, :] < window
        full &= ends[:, None] - starts[None, :] < window
    partial = (seen & ~full) | torch.eye(len(starts), dtype=torch.bool)
    on_device = sample_T.to(device, non_blocking=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key <= query) & (on_device[query] == on_device[key])
        return allowed if window is None else allowed & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_ordered(partial, device),
        *_ordered(full, device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _ordered(blocks_QK: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 `[1, 1, Q]` and `[1, 1, Q, K]`: how many key blocks each row has; which, and then the others."""
    indices = blocks_QK.int().argsort(dim=-1, descending=True, stable=True)
    counts = blocks_QK.sum(dim=-1)
    return counts.int()[None, None].to(device), indices.int()[None, None].to(device)


def _longest(borders: Sequence[int]) -> int:
    return max(end - start for start, end in pairwise(borders))


def _effective(window: int | None, longest: int) -> int | None:
    return None if window is None or window >= longest else window


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def bent(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bent


@cache
def _flex(device: str) -> Callable[..., Any]:
    """fullgraph: rather an error than the T x T matrix that it falls back to when it gives up compiling.

    Not dynamic=True, which makes a variable of the soft-cap too, and that is refused. Lengths become dynamic
    with the second batch by themselves.
    """
    kernel = torch.compile(flex_attention, fullgraph=True) if device == "cuda" else flex_attention
    return cast("Callable[..., Any]", kernel)


def forget_compiled() -> None:
    """At the start of a run: torch compiles a function for a handful of shapes and options, then refuses. An
    LLM after the other in one process would use them up.
    """
    _flex.cache_clear()
    _capped.cache_clear()
    torch.compiler.reset()
    # a Gemma-2 alone has 6 kinds: window or none, one length or any, gradients or none
    torch._dynamo.config.recompile_limit = 64


@cache
def _varlen() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # not in every torch we run on

    return varlen_attn
