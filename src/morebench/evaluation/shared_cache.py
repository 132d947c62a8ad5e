"""Keys and values of a chunk, every prefix held once.

A group has one line of slots: its prefix, then tokens of all its rows in any order. What a token sees follows
from whose tokens the slots hold and from their positions in the text, never from the order of the slots.
So rows of any length lie side by side without pads between prefix and question, nothing is copied to share a
prefix, and a sliding window means what it means in training.

Letters: P groups, S slots, T new tokens (packed), G key heads, K head width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PREFIX = -1  # whose tokens: of every row of the group
NOBODY = -2
_MULTIPLE = 16


def aligned(num_slots: int) -> int:
    """Fused kernels on GPUs want masks of such widths."""
    return -(-num_slots // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class NewTokens:
    """Packed, in the order of their groups. `first_group`..`last_group`: the lines that are read."""

    first_group: int
    last_group: int  # excluded
    groups: np.ndarray  # [T]
    rows: np.ndarray  # [T], whose they are, or PREFIX
    positions: np.ndarray  # [T], in the text


class SharedCache:
    def __init__(self, num_groups: int, num_slots: int, num_layers: int) -> None:
        shape = num_groups, aligned(num_slots)
        self.row_PS = np.full(shape, NOBODY, dtype=np.int32)
        self.position_PS = np.zeros(shape, dtype=np.int32)
        self.used_P = np.zeros(num_groups, dtype=np.int64)
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers  # keys, values [P, S, G, K]

    def has_room(self, new_P: np.ndarray) -> bool:
        return bool((self.used_P + new_P <= self.row_PS.shape[1]).all())

    def reserve(self, new: NewTokens) -> np.ndarray:
        """-> slots `[T]`, counted through all groups, whose keys and values `write` then brings."""
        slots = self.used_P[new.groups] + rank_in(new.groups)
        self.row_PS[new.groups, slots] = new.rows
        self.position_PS[new.groups, slots] = new.positions
        np.add.at(self.used_P, new.groups, 1)
        return new.groups * self.row_PS.shape[1] + slots

    def write(self, layer: int, slot_T: Tensor, key_TGK: Tensor, value_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """-> all keys and values `[P, S, G, K]`."""
        held = self._layers[layer]
        if held is None:
            # zeros: what a mask hides must still be a number
            held = (
                key_TGK.new_zeros(*self.row_PS.shape, *key_TGK.shape[1:]),
                value_TGK.new_zeros(*self.row_PS.shape, *value_TGK.shape[1:]),
            )
            self._layers[layer] = held
        for whole, new in zip(held, (key_TGK, value_TGK), strict=True):
            whole.flatten(0, 1).index_copy_(0, slot_T, new)
        return held

    def slots_of(self, group: int, rows: Collection[int]) -> np.ndarray:
        """What these rows can see of their group, counted through all groups."""
        seen = np.isin(self.row_PS[group], [PREFIX, *rows])
        return group * self.row_PS.shape[1] + np.flatnonzero(seen)

    def kept(self, rows: Sequence[tuple[int, int]], room: int) -> tuple["SharedCache", dict[int, int]]:
        """The cache of these (group, row) only, with free slots for `room` more tokens of each.

        -> also the new number of every group that is left. This one is emptied.
        """
        rows_of: dict[int, list[int]] = {}
        for group, row in sorted(rows):
            rows_of.setdefault(group, []).append(row)
        slots = [self.slots_of(group, own) for group, own in rows_of.items()]
        sizes = [len(kept) + room * len(own) for kept, own in zip(slots, rows_of.values(), strict=True)]
        new = SharedCache(len(rows_of), max(sizes), len(self._layers))
        index_PS = padded(slots, new.row_PS.shape[1])
        new.used_P[:] = [len(kept) for kept in slots]
        filled_PS = np.arange(index_PS.shape[1]) < new.used_P[:, None]
        new.row_PS[filled_PS] = self.row_PS.take(index_PS)[filled_PS]
        new.position_PS[filled_PS] = self.position_PS.take(index_PS)[filled_PS]
        for number, layer in enumerate(self._layers):
            assert layer is not None
            index = torch.from_numpy(index_PS).to(layer[0].device)
            keys, values = (old.flatten(0, 1)[index] for old in layer)
            new._layers[number] = keys, values
            self._layers[number] = None  # layer by layer: never twice in memory
        return new, {group: place for place, group in enumerate(rows_of)}


def padded(pieces: Sequence[np.ndarray], size: int) -> np.ndarray:
    """One piece a line; 0 behind its end."""
    lines = np.zeros((len(pieces), size), dtype=np.int64)
    for line, piece in zip(lines, pieces, strict=True):
        line[: len(piece)] = piece
    return lines


def rank_in(groups: np.ndarray) -> np.ndarray:
    """How many came before in the same run of equal numbers."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
