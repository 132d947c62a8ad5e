"""Pieces of tensors: what a checkpoint is made of, whatever the strategy and the number of ranks."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor


class Fragment(NamedTuple):
    """A contiguous piece of a flattened tensor, as one rank holds it.

    Every way of sharding cuts tensors into such pieces, so that a checkpoint of one strategy and
    world size can be read by any other.
    """

    values: Tensor  # 1-D
    start: int  # of the piece in the flattened whole
    shape: tuple[int, ...]  # of the whole


class Pieces(Protocol):
    """A stored set of named tensors, of which any part can be read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """1-D, on the CPU: elements [start, stop) of the flattened tensor."""


def whole(tensor: Tensor) -> Fragment:
    return Fragment(tensor.detach().flatten(), 0, tuple(tensor.shape))


def read_whole(pieces: Pieces, name: str) -> Tensor:
    shape = pieces.shapes[name]
    count = 1
    for size in shape:
        count *= size
    return pieces.read(name, 0, count).view(shape)
