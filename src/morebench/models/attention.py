"""Attention over a packed batch that never crosses sample borders, registered with transformers.

The borders come from the batch itself (`cu_seqlens`), so no T x T mask of the whole pack is ever built and
the cost is the sum of T_i^2. transformers' own packing path needs `use_cache=False` and position ids that
restart, and leaks silently between samples when either is missing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

# Deliberately not registered in transformers' AttentionMaskInterface: then no mask is built at all.
VARLEN = "morebench_varlen"


class Attend(Protocol):
    """Causal attention inside each sample of one batch, made once a batch for all layers."""

    def __call__(
        self,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """H query heads share G key heads; a query sees the last `window` positions. -> `[1, T, H, K]`."""


# What torch.compile makes of a block ends here and goes on behind: borders differ in every batch.
@torch.compiler.disable
def varlen_attention(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Sequence[int] | Attend | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`cu_seqlens`: the N + 1 sample borders, or what was made of them. -> `[1, T, H, K]`."""
    if cu_seqlens is None or attention_mask is not None or dropout:
        raise ValueError(
            f"{VARLEN} needs cu_seqlens, no mask and no dropout; found cu_seqlens={cu_seqlens}, "
            f"mask={attention_mask is not None}, dropout={dropout}. To generate with a cache, call "
            "llm.set_attn_implementation('eager') first."
        )
    attend = Loop(cu_seqlens) if isinstance(cu_seqlens, Sequence) else cu_seqlens
    scale = query_1HTK.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query_1HTK, key_1GTK, value_1GTK, scale, softcap, sliding_window), None


class Loop:
    """One sample after the other: exact, with a backward pass, on any device."""

    def __init__(self, borders: Sequence[int]) -> None:
        # integers: a tensor would cost one device synchronisation a layer
        self._lengths = [end - start for start, end in pairwise(borders)]

    def __call__(
        self,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        # split, not slices: the backward of N slices would fill N tensors of the whole pack with zeros
        tensors = (query_1HTK, key_1GTK, value_1GTK)
        queries, keys, values = (tensor.split(self._lengths, 2) for tensor in tensors)
        outputs = [
            _one_sample(query, key, value, scale, softcap, window)
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _one_sample(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    length = query.shape[2]
    windowed = window is not None and window < length
    if softcap is None and not windowed:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    if windowed:
        assert window is not None
        visible = visible.triu_(1 - window)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scale, enable_gqa=True
        )
    num_groups = key.shape[1]
    # heads of one group read the same keys: no repeated copy
    grouped = (query * (scale / softcap)).unflatten(1, (num_groups, -1))
    scores = torch.tanh(grouped @ key.unsqueeze(2).mT) * softcap
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(query.dtype) @ value.unsqueeze(2)).flatten(1, 2)


AttentionInterface.register(VARLEN, varlen_attention)
