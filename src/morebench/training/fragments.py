"""Pieces of tensors: what a checkpoint is made of, whatever the strategy and the number of ranks."""

import math
from typing import NamedTuple

from torch import Tensor

from morebench.models.stored import Pieces as Pieces


class Fragment(NamedTuple):
    """A contiguous piece of a flattened tensor, as one rank holds it.

    Every way of sharding cuts tensors into such pieces, so that a checkpoint of one strategy and
    world size can be read by any other.
    """

    values: Tensor  # 1-D
    start: int  # of the piece in the flattened whole
    shape: tuple[int, ...]  # of the whole


def whole(tensor: Tensor) -> Fragment:
    return Fragment(tensor.detach().flatten(), 0, tuple(tensor.shape))


def read_whole(pieces: Pieces, name: str) -> Tensor:
    shape = pieces.shapes[name]
    return pieces.read(name, 0, math.prod(shape)).view(shape)
