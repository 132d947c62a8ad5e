"""The ways to compute packed attention against the loop over samples: how far apart, how fast."""

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from morebench.config.schema import Attention
from morebench.models.attention import varlen_attention
from morebench.models.attention_gpu import attend_with, attention_problem

# (label, query heads, key heads, head size, soft-cap, window), as in Phi-4-mini and Gemma-2-9B
_SHAPES = [
    ("Phi-4-mini", 24, 8, 128, None, None),
    ("Gemma-2-9B", 16, 8, 256, 50.0, None),
    ("Gemma-2-9B, window 1024", 16, 8, 256, 50.0, 1024),
]
_REPEATS = 10


def compare_attention(device: torch.device, tiny: bool) -> Iterator[str]:
    lengths = [40, 1, 70, 33] if tiny else [979, 754, 300, 1500, 1, 4000, 850, 979, 3021, 4000]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for label, heads, groups, width, softcap, window in _SHAPES:
        if tiny:
            heads, groups, width, window = heads // 4, groups // 4, 16, window and 16
        tensors = [
            torch.randn(1, n, sum(lengths), width, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, groups, groups)
        ]
        upstream = torch.randn(1, sum(lengths), heads, width, device=device, dtype=dtype)
        facts = {"scaling": width**-0.5, "softcap": softcap, "sliding_window": window}
        borders = [0, *accumulate(lengths)]
        exact = _passes(
            [tensor.detach().float().requires_grad_() for tensor in tensors], borders, facts, upstream
        )
        for kind in Attention:
            if kind is Attention.auto:
                continue
            made = _borders(kind, borders, device, dtype, softcap, width)
            if isinstance(made, str):
                yield f"attention, {label}, {kind.name}: not here: {made}"
                continue
            found = _passes(tensors, made, facts, upstream)
            errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
            seconds = _seconds(tensors, made, facts, upstream, device)
            yield (
                f"attention, {label}, {kind.name}: forward and backward {1000 * seconds:.2f} ms; "
                f"relative error {errors[0]:.1e}, of gradients {max(errors[1:]):.1e}"
            )


def _borders(
    kind: Attention,
    borders: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    softcap: float | None,
    head_dim: int,
) -> Any:
    """What `varlen_attention` takes as `cu_seqlens`, or why this kind is not possible."""
    if kind is Attention.loop:
        return borders
    problem = attention_problem(kind, device.type, dtype, softcap, head_dim)
    return problem or attend_with(kind, borders, device)


def _passes(tensors: list[Tensor], borders: Any, facts: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    """The output and the three gradients."""
    out, _ = varlen_attention(nn.Module(), *tensors, None, cu_seqlens=borders, **facts)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def _seconds(
    tensors: list[Tensor], borders: Any, facts: dict[str, Any], upstream: Tensor, device: torch.device
) -> float:
    for repeat in range(_REPEATS + 2):
        if repeat == 2:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
        _passes(tensors, borders, facts, upstream)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / _REPEATS
