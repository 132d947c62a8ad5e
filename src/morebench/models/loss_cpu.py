"""The summed loss and its gradients in one pass over the logits, a few rows at a time, in place.

A large vocabulary makes the logits, not the products they come from, the dear part of a step on the CPU:
autograd walks over them a dozen times, in memory. Here a piece is made, used and gone while it is cached.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Logits of a piece: 32 MiB.
_LOGITS_PER_PIECE = 2**23


def one_pass_loss_sum(hidden_SD: Tensor, head: nn.Linear, softcap: float | None, targets_S: Tensor) -> Tensor:
    """fp32 []. All tensors are fp32."""
    loss: Tensor = _LossSum.apply(hidden_SD, head.weight, head.bias, softcap, targets_S)
    return loss


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_ZD: Tensor,
        bias_Z: Tensor | None,
        softcap: float | None,
        targets_S: Tensor,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden_grad_SD = torch.empty_like(hidden_SD) if of_hidden else None
        weight_grad_ZD = torch.zeros_like(weight_ZD) if of_weight else None
        bias_grad_Z = torch.zeros_like(bias_Z) if of_bias and bias_Z is not None else None
        total, rows = hidden_SD.new_zeros(()), max(1, _LOGITS_PER_PIECE // len(weight_ZD))
        for start in range(0, len(hidden_SD), rows):
            piece, target_S1 = hidden_SD[start : start + rows], targets_S[start : start + rows, None]
            logits_SZ = linear(piece, weight_ZD, bias_Z)
            bent_SZ = None
            if softcap is not None:
                bent_SZ = logits_SZ.div_(softcap).tanh_()
                logits_SZ = bent_SZ * softcap
            chosen_S1 = logits_SZ.gather(1, target_S1)
            norm_S1 = logits_SZ.logsumexp(1, keepdim=True)
            total += (norm_S1 - chosen_S1).sum()
            if hidden_grad_SD is None and weight_grad_ZD is None:
                continue
            grad_SZ = logits_SZ.sub_(norm_S1).exp_()
            grad_SZ.scatter_(1, target_S1, (chosen_S1 - norm_S1).exp() - 1)
            if bent_SZ is not None:
                grad_SZ.addcmul_(grad_SZ, bent_SZ.square_(), value=-1)  # tanh' is 1 - tanh^2
            if hidden_grad_SD is not None:
                torch.mm(grad_SZ, weight_ZD, out=hidden_grad_SD[start : start + rows])
            if weight_grad_ZD is not None:
                weight_grad_ZD.addmm_(grad_SZ.T, piece)
            if bias_grad_Z is not None:
                bias_grad_Z += grad_SZ.sum(0)
        ctx.save_for_backward(hidden_grad_SD, weight_grad_ZD, bias_grad_Z)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * upstream for grad in ctx.saved_tensors)
        return (*grads, None, None)
