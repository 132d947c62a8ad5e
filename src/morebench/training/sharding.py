"""What differs between strategies: where trained parameters, gradients and optimizer state lie, and how
gradients add up. Everything else of a train step is the same under each.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from morebench.config.schema import Precision
from morebench.models.mllm import MLLM
from morebench.training.fragments import Fragment, Pieces, read_whole, whole
from morebench.training.resume import restore_optimizer, restore_parameters

Parameters = Mapping[
    str, nn.Parameter
]  # what the optimizer holds, by name and in its order; tied weights once


class Sharding(Protocol):
    """Every method is called on all ranks at the same time, so that it may communicate."""

    @property
    def waits_inside(self) -> bool:
        """Whether ranks wait for each other inside forward and backward of a micro-batch."""

    def place(self, mllm: MLLM, precision: Precision) -> None:
        """Before there is an optimizer: shard in place and fill what is unread. Replicas need nothing."""

    @property
    def loss_factor(self) -> float:
        """What a micro-batch's share of the global loss is multiplied with, so that gradients *add up*.

        A bin gives (its loss sum) / (supervised tokens of the whole global batch); the gradient of the global
        batch is the sum of these over all bins of all ranks.
        """

    def grad_norm(self, trained: Parameters) -> Tensor:
        """fp32 []; Euclidean norm of the global batch's whole gradient, the same on all ranks."""

    def clip(self, trained: Parameters, max_norm: float, grad_norm: Tensor) -> None:
        """Scale the gradients in place so that their norm, which is `grad_norm`, is at most `max_norm`."""

    def parameters(self, trained: Parameters) -> dict[str, Fragment]:
        """This rank's pieces of the fp32 parameters. Of replicas, the first rank has all."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, trained: Parameters) -> dict[str, Fragment]:
        """As `parameters`; of `<parameter name>/<state name>`."""

    def restore(
        self, optimizer: torch.optim.Optimizer, trained: Parameters, parameters: Pieces, state: Pieces
    ) -> None:
        """Undo `parameters` and `optimizer_state`. Raises RunError when names or shapes differ."""

    def gather(self, trained: Parameters) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other: fp32, on the CPU."""


class Replicated:
    """Single device and DDP: every rank has everything."""

    def __init__(self, trainer: Trainer, mean_over_ranks: bool) -> None:
        self._trainer = trainer
        self._mean_over_ranks = mean_over_ranks  # DDP's reduction, undone in the loss

    @property
    def waits_inside(self) -> bool:
        return False  # DDP's wrapper alone does, and only in backward

    def place(self, mllm: MLLM, precision: Precision) -> None:
        pass

    @property
    def loss_factor(self) -> float:
        # Lightning divides by the number of micro-batches
        factor = self._trainer.accumulate_grad_batches
        return float(factor * self._trainer.world_size if self._mean_over_ranks else factor)

    def grad_norm(self, trained: Parameters) -> Tensor:
        return nn.utils.get_total_norm([value.grad for value in trained.values() if value.grad is not None])

    def clip(self, trained: Parameters, max_norm: float, grad_norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(trained.values(), max_norm, grad_norm)

    def parameters(self, trained: Parameters) -> dict[str, Fragment]:
        if not self._trainer.is_global_zero:
            return {}
        return {name: whole(value) for name, value in trained.items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer, trained: Parameters) -> dict[str, Fragment]:
        if not self._trainer.is_global_zero:
            return {}
        return {
            f"{name}/{key}": whole(value)
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }

    def restore(
        self, optimizer: torch.optim.Optimizer, trained: Parameters, parameters: Pieces, state: Pieces
    ) -> None:
        restore_parameters(trained, {name: read_whole(parameters, name) for name in parameters.shapes})
        restore_optimizer(optimizer, list(trained), {name: read_whole(state, name) for name in state.shapes})

    def gather(self, trained: Parameters) -> Iterator[tuple[str, Tensor]]:
        for name, value in trained.items():
            yield name, value.detach().float().cpu()
