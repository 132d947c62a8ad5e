"""What ranks tell each other at the end of an optimizer step: true for all where it is for any."""

from typing import NamedTuple

import torch
from torch import Tensor


class Told(NamedTuple):
    stop: bool = False  # a signal asked to
    save: bool = False  # a checkpoint is due (the first rank's clock) and none is being written
    busy: bool = False  # the writer is at work
    pending: bool = False  # ... or has written what is not committed yet
    moved: bool = False  # the writer got on since it was asked before
    failed: bool = False  # the writer could not
    full: bool = False  # ... because the disk is full

    def tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(self, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, sums: list[float]) -> "Told":
        return cls(*(value > 0 for value in sums))


def agree(mine: Told, world_size: int, device: torch.device) -> Told:
    """By a collective of its own."""
    sums = mine.tensor(device)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return Told.of(sums.tolist())
