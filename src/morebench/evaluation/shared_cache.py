"""Keys and values of a chunk, every prefix held once, and the attention that reads them.

A group has one line of slots: its prefix, then tokens of all its rows in any order. What a token sees follows
from whose tokens the slots hold and from their positions in the text, never from the order of the slots.
So rows of any length lie side by side without pads between prefix and question, nothing is copied to share a
prefix, and a sliding window means what it means in training.

Letters: P groups, S slots, T new tokens (packed), Q of them per group (padded), H query heads, G key heads,
K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PREFIX = -1  # whose tokens: of every row of the group
_NOBODY = -2
_MULTIPLE = 16  # of slots: fused kernels on GPUs want aligned masks
_SCORES_AT_ONCE = 2**28  # soft-capped attention writes them out: 1 GiB in fp32


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
        num_slots = -(-num_slots // _MULTIPLE) * _MULTIPLE
        self.row_PS = np.full((num_groups, num_slots), _NOBODY, dtype=np.int32)
        self.position_PS = np.zeros((num_groups, num_slots), dtype=np.int32)
        self.used_P = np.zeros(num_groups, dtype=np.int64)
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers  # keys and values [P, S, G, K]

    def has_room(self, new_P: np.ndarray) -> bool:
        return bool((self.used_P + new_P <= self.row_PS.shape[1]).all())

    def attend_for(self, new: NewTokens, device: torch.device) -> "CachedAttention":
        """What `cu_seqlens` takes for one pass over the LLM, which then holds the tokens' keys and values."""
        rank_T = _rank_in_group(new.groups)
        slot_T = self.used_P[new.groups] + rank_T
        fresh = not self.used_P[new.first_group : new.last_group].any()
        self.row_PS[new.groups, slot_T] = new.rows
        self.position_PS[new.groups, slot_T] = new.positions
        np.add.at(self.used_P, new.groups, 1)
        return CachedAttention(self, new, slot_T, rank_T, fresh, device)

    def kept(self, rows: Sequence[tuple[int, int]], room: int) -> tuple["SharedCache", dict[int, int]]:
        """The cache of these (group, row) only, with free slots for `room` more tokens of each.

        -> also the new number of every group that is left. This one is emptied.
        """
        groups = sorted({group for group, _ in rows})
        chosen = [
            np.flatnonzero(np.isin(self.row_PS[group], [PREFIX, *(row for g, row in rows if g == group)]))
            for group in groups
        ]
        more = [room * sum(g == group for g, _ in rows) for group in groups]
        size = max(len(slots) + extra for slots, extra in zip(chosen, more, strict=True))
        new = SharedCache(len(groups), size, len(self.layers))
        index_PS = np.zeros(new.row_PS.shape, dtype=np.int64)
        for place, (group, slots) in enumerate(zip(groups, chosen, strict=True)):
            new.row_PS[place, : len(slots)] = self.row_PS[group, slots]
            new.position_PS[place, : len(slots)] = self.position_PS[group, slots]
            new.used_P[place] = len(slots)
            index_PS[place, : len(slots)] = group * self.row_PS.shape[1] + slots
        for number, layer in enumerate(self.layers):
            assert layer is not None
            index = torch.from_numpy(index_PS).flatten().to(layer[0].device)
            keys, values = (
                old.flatten(0, 1).index_select(0, index).view(*index_PS.shape, *old.shape[2:])
                for old in layer
            )
            new.layers[number] = keys, values
            self.layers[number] = None
        return new, {group: place for place, group in enumerate(groups)}

    def write(self, layer: int, flat_T: Tensor, key_TGK: Tensor, value_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """`flat_T`: slots, counted through all groups. -> all keys and values `[P, S, G, K]`."""
        found = self.layers[layer]
        if found is None:
            shape = (*self.row_PS.shape, *key_TGK.shape[1:])
            found = key_TGK.new_zeros(shape), value_TGK.new_zeros((*shape[:3], value_TGK.shape[2]))
            self.layers[layer] = found
        for held, new in zip(found, (key_TGK, value_TGK), strict=True):
            held.view(-1, *held.shape[2:]).index_copy_(0, flat_T, new)
        return found


class CachedAttention:
    """`Attend` of one pass over the LLM: layers come in their order."""

    def __init__(
        self,
        cache: SharedCache,
        new: NewTokens,
        slot_T: np.ndarray,
        rank_T: np.ndarray,
        fresh: bool,
        device: torch.device,
    ) -> None:
        self._cache = cache
        self._groups = slice(new.first_group, new.last_group)
        num_groups, num_queries = new.last_group - new.first_group, int(rank_T.max()) + 1
        used = int(cache.used_P[self._groups].max())
        self._slots = slice(0, -(-used // _MULTIPLE) * _MULTIPLE)
        padded_T = (new.groups - new.first_group) * num_queries + rank_T
        token_PQ = np.zeros(num_groups * num_queries, dtype=np.int64)
        token_PQ[padded_T] = np.arange(len(padded_T))
        # Lines of one row each, equally long and nothing before them: plain causal attention.
        self._plain = fresh and len(padded_T) == num_groups * num_queries and _one_row_each(new)
        self._shape = num_groups, num_queries
        self.num_layers = 0
        index = np.stack([new.groups * cache.row_PS.shape[1] + slot_T, padded_T])
        self._flat_T, self._padded_T = torch.from_numpy(index).to(device)
        self._token_PQ = torch.from_numpy(token_PQ).to(device)
        keys = np.stack([part[self._groups, self._slots] for part in (cache.row_PS, cache.position_PS)])
        queries = np.stack([new.rows, new.positions]).astype(np.int32)[:, token_PQ]
        self._keys = torch.from_numpy(keys).to(device)
        self._queries = torch.from_numpy(queries).to(device).view(2, *self._shape)
        self._masks: dict[int | None, Tensor] = {}

    def __call__(
        self,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        key_TGK, value_TGK = key_1GTK[0].transpose(0, 1), value_1GTK[0].transpose(0, 1)
        keys, values = self._cache.write(self.num_layers, self._flat_T, key_TGK, value_TGK)
        self.num_layers += 1
        num_groups, num_queries = self._shape
        num_heads, num_key_heads = query_1HTK.shape[1], key_1GTK.shape[1]
        if self._plain and softcap is None and (window is None or window >= num_queries):
            # [1, H, T, K] -> [P, H, Q, K]
            query, key, value = (
                tensor[0].unflatten(1, self._shape).transpose(0, 1)
                for tensor in (query_1HTK, key_1GTK, value_1GTK)
            )
            out = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2).flatten(0, 1)[None]
        key_PGSK, value_PGSK = (part[self._groups, self._slots].transpose(1, 2) for part in (keys, values))
        # Heads that share a key head are further queries of it: [P, G, R Q, K] with H = G R, no copy of keys.
        query_PQHK = query_1HTK[0].transpose(0, 1).index_select(0, self._token_PQ).unflatten(0, self._shape)
        query_PGNK = query_PQHK.transpose(1, 2).reshape(num_groups, num_key_heads, -1, query_1HTK.shape[3])
        mask_P1NS = self._mask(window, num_heads // num_key_heads, query_PGNK.dtype)
        if softcap is None:
            out_PGNK = scaled_dot_product_attention(query_PGNK, key_PGSK, value_PGSK, mask_P1NS, scale=scale)
        else:
            out_PGNK = _softcapped(query_PGNK * scale, key_PGSK, value_PGSK, mask_P1NS, softcap)
        out_PHQK = out_PGNK.reshape(num_groups, num_heads, num_queries, -1)
        return out_PHQK.transpose(1, 2).flatten(0, 1).index_select(0, self._padded_T)[None]

    def _mask(self, window: int | None, num_repeats: int, dtype: torch.dtype) -> Tensor:
        """`[P, 1, N, S]`: 0 where a query sees a slot, else -inf."""
        if window not in self._masks:
            (row_PQ, position_PQ), (row_PS, position_PS) = self._queries, self._keys
            back_PQS = position_PQ[:, :, None] - position_PS[:, None, :]
            own_PQS = row_PQ[:, :, None] == row_PS[:, None, :]
            visible_PQS = (own_PQS | (row_PS == PREFIX)[:, None, :]) & (back_PQS >= 0)
            if window is not None:
                visible_PQS &= back_PQS < window
            mask_PQS = torch.zeros(visible_PQS.shape, dtype=dtype, device=visible_PQS.device)
            mask_PQS.masked_fill_(~visible_PQS, float("-inf"))
            # written out once for all layers: fused kernels want it whole
            self._masks[window] = mask_PQS[:, None].repeat(1, 1, num_repeats, 1)
        return self._masks[window]


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """Queries are scaled. A few groups at a time."""
    num_heads, num_queries, num_slots = query.shape[1], query.shape[2], key.shape[2]
    size = max(1, _SCORES_AT_ONCE // (num_heads * num_queries * num_slots))
    pieces = []
    for q, k, v, m in zip(*(tensor.split(size) for tensor in (query, key, value, mask)), strict=True):
        scores = torch.tanh((q / softcap) @ k.mT) * softcap + m
        pieces.append(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)
    return torch.cat(pieces)


def _rank_in_group(group_T: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.r_[True, group_T[1:] != group_T[:-1]])
    return np.arange(len(group_T)) - np.repeat(starts, np.diff(np.r_[starts, len(group_T)]))


def _one_row_each(new: NewTokens) -> bool:
    same = new.groups[1:] == new.groups[:-1]
    return bool((new.rows[1:] == new.rows[:-1])[same].all())
