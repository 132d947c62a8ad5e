"""Kernels for the sum of cross-entropies over supervised tokens."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from morebench.config.schema import LossKernel, Strategy


def loss_kernel_problem(kind: LossKernel, device: str, dtype: torch.dtype, strategy: Strategy) -> str | None:
    """Why this kind cannot be used; None if it can."""
    if kind is LossKernel.torch:
        return None
    if strategy is Strategy.zero3:  # gathers the head's weights only while the head is called
        return "it reads the head's weights beside the head, which ZeRO-3 keeps in pieces: torch"
    if kind is LossKernel.one_pass:
        is_usable = device == "cpu" and dtype is torch.float32
        return None if is_usable else "it computes in fp32 on the CPU only: torch"
    if device != "cuda":
        return f"it needs a GPU, and this run is on {device}: torch"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'morebench[liger]', or torch"
    return None


def liger_loss_sum(hidden_SD: Tensor, targets_S: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """Logits of some positions at a time; gradients are made in the forward pass, so logits are made once.

    A head without gradient gets none. Gradients of its weights add up in fp32.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel: Any = LigerFusedLinearCrossEntropyLoss(
        reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    loss: Tensor = kernel(head.weight, hidden_SD, targets_S, head.bias)
    return loss
