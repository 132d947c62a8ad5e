"""Optimizer steps whose loss or gradient is NaN or infinite: left out as often as the recipe allows."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from morebench.data.records import Sample
from morebench.errors import NonFiniteError
from morebench.training.files import write_atomically

_SHOWN = 16  # samples in a message


class MicroBatchLoss(NamedTuple):
    rank: int
    loss: float  # sum over supervised tokens
    samples: list[int]


class NonFinite:
    """`skipped`: optimizer steps left out so far, earlier starts of the run included."""

    def __init__(self, samples: Sequence[Sample], allowed: int, skipped: Sequence[int], root: Path | None):
        self._samples = samples
        self._allowed = allowed
        self.skipped = list(skipped)
        self.is_over = False  # one too many
        self._root = root  # where what is known of such a step is left; None on all ranks but the first

    def note(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        losses: Sequence[MicroBatchLoss],
        grad_norms: Mapping[str, float],
    ) -> None:
        """Raises NonFiniteError once the step is one too many."""
        if self._root is not None:
            self._root.mkdir(parents=True, exist_ok=True)
            content = self._content(step, loss, grad_norm, losses, grad_norms)
            path = self._root / f"step_{step:08d}.json"
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        blame = self._blame(step, loss, grad_norm, losses)
        if len(self.skipped) >= self._allowed:
            self.is_over = True
            left_out = f" after leaving out steps {self.skipped}" if self.skipped else ""
            raise NonFiniteError(
                f"{blame} This step changed no weight; max_skipped_steps={self._allowed} allows no "
                f"further one{left_out}. Look at these samples, or lower optimizer.lr."
            )
        self.skipped.append(step)
        if self._root is not None:
            print(
                f"{blame} Left out: {len(self.skipped)} of at most {self._allowed}.",
                file=sys.stderr,
                flush=True,
            )

    def anomalies(self) -> list[str]:
        """For the manifest."""
        if not self.skipped:
            return []
        return [f"optimizer steps {self.skipped} were left out: their loss or gradients were not finite"]

    def _content(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        losses: Sequence[MicroBatchLoss],
        grad_norms: Mapping[str, float],
    ) -> dict[str, Any]:
        return {
            "step": step,
            "loss": number(loss),
            "grad_norm": number(grad_norm),
            "skipped_before": self.skipped,
            "allowed": self._allowed,
            "micro_batches": [
                {
                    "rank": one.rank,
                    "loss_sum": number(one.loss),
                    "samples": [{"index": index, "id": self._samples[index].id} for index in one.samples],
                }
                for one in losses
            ],
            "grad_norms": {name: number(value) for name, value in grad_norms.items()},
        }

    def _blame(self, step: int, loss: float, grad_norm: float, losses: Sequence[MicroBatchLoss]) -> str:
        bad = [one for one in losses if not math.isfinite(one.loss)]
        ids = [self._samples[index].id for one in bad or losses for index in one.samples]
        return (
            f"Optimizer step {step}: loss {loss}, gradient norm {grad_norm}. "
            f"{'Non-finite loss in' if bad else 'In'} {len(ids)} samples: {', '.join(ids[:_SHOWN])}"
            f"{', ...' if len(ids) > _SHOWN else ''}."
        )


def number(value: float) -> float | str:
    """JSON has no NaN and no infinity: as text, which no reader takes for a number."""
    return value if math.isfinite(value) else str(value)


def gathered(mine: list[MicroBatchLoss], world_size: int) -> list[MicroBatchLoss]:
    """Of all ranks, in their order."""
    if world_size == 1:
        return mine
    everyone: list[list[MicroBatchLoss]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(everyone, mine)
    return [one for of_rank in everyone for one in of_rank]


def group_of(name: str) -> str:
    """`llm.model.layers.3.mlp.up_proj.weight` -> `llm.model.layers.3`: a block, or what stands outside."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])
