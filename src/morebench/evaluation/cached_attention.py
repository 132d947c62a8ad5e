"""The attention of a pass over the LLM that reads a `SharedCache` and adds to it.

Letters as there, and: L lines, Q new tokens of a line (padded), H query heads, N = Q H / G: heads that share
a key head are further queries of it, so that keys are never repeated.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from morebench.evaluation.shared_cache import NOBODY, PREFIX, NewTokens, SharedCache, aligned, padded, rank_in

# New tokens of several rows beyond which a group is read in several lines.
_TOKENS_OF_A_LINE = 128
_SCORES_AT_ONCE = 2**28  # soft-capped attention writes them out: 1 GiB in fp32


class CachedAttention:
    """`Attend` of one pass: `MLLM` hands it over as `cu_seqlens`, and layers come in their order.

    A line is what attends together: the new tokens of a group and its slots. A mask hides what is another
    row's. Where a group has many new tokens, a line has some of its rows only: then less is hidden, which
    saves more than the copy of the prefix's keys costs.
    """

    def __init__(self, cache: SharedCache, new: NewTokens, device: torch.device) -> None:
        fresh = not cache.used_P[new.first_group : new.last_group].any()
        slot_T = cache.reserve(new)
        self._cache = cache
        self._layer = 0
        lines, members = _lines(new)
        num_groups = new.last_group - new.first_group
        self._index: Tensor | None = None  # [L, S]: slots that are gathered, if a line is no whole group
        if len(members) > num_groups:
            slots = [cache.slots_of(group, rows) for group, rows in members]
            index_LS = padded(slots, aligned(max(map(len, slots))))
            self._index = torch.from_numpy(index_LS).to(device)
            keys = np.stack([cache.row_PS.take(index_LS), cache.position_PS.take(index_LS)])
            keys[0][np.arange(index_LS.shape[1]) >= np.array([len(own) for own in slots])[:, None]] = NOBODY
        else:
            lines = new.groups - new.first_group  # those without new tokens too: a slice is no copy
            used = int(cache.used_P[new.first_group : new.last_group].max())
            self._part = slice(new.first_group, new.last_group), slice(aligned(used))
            keys = np.stack([cache.row_PS[self._part], cache.position_PS[self._part]])
        num_lines, num_queries = keys.shape[1], int(rank_in(lines).max()) + 1
        self._shape = num_lines, num_queries
        # Equally long lines with nothing before them: of one prefix or row each, so plain causal attention.
        self._plain = bool(fresh and len(lines) == num_lines * num_queries)
        place_T = lines * num_queries + rank_in(lines)
        token_LQ = np.zeros(num_lines * num_queries, dtype=np.int64)
        token_LQ[place_T] = np.arange(len(place_T))
        self._slot_T, self._place_T = torch.from_numpy(np.stack([slot_T, place_T])).to(device)
        self._token_LQ = torch.from_numpy(token_LQ).to(device)
        queries = np.stack([new.rows, new.positions]).astype(np.int32)[:, token_LQ]
        self._queries = torch.from_numpy(queries).to(device).unflatten(1, self._shape)
        self._keys = torch.from_numpy(keys).to(device)
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
        held = self._cache.write(self._layer, self._slot_T, key_TGK, value_TGK)
        self._layer += 1
        num_queries = self._shape[1]
        if self._plain and softcap is None and (window is None or window >= num_queries):
            query, key, value = (
                tensor[0].unflatten(1, self._shape).transpose(0, 1)
                for tensor in (query_1HTK, key_1GTK, value_1GTK)
            )
            out_LHQK = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            return out_LHQK.transpose(1, 2).flatten(0, 1)[None]
        key_LGSK, value_LGSK = (
            (part[self._part] if self._index is None else part.flatten(0, 1)[self._index]).transpose(1, 2)
            for part in held
        )
        query_LQHK = query_1HTK[0].transpose(0, 1)[self._token_LQ].unflatten(0, self._shape)
        query_LGNK = query_LQHK.transpose(1, 2).unflatten(1, (key_1GTK.shape[1], -1)).flatten(2, 3)
        mask_L1NS = self._mask(window, query_LGNK.shape[2] // num_queries, query_LGNK.dtype)
        if softcap is None:
            out_LGNK = scaled_dot_product_attention(query_LGNK, key_LGSK, value_LGSK, mask_L1NS, scale=scale)
        else:
            out_LGNK = _softcapped(query_LGNK * scale, key_LGSK, value_LGSK, mask_L1NS, softcap)
        out_LHQK = out_LGNK.unflatten(2, (-1, num_queries)).flatten(1, 2)
        return out_LHQK.transpose(1, 2).flatten(0, 1)[self._place_T][None]

    def _mask(self, window: int | None, num_repeats: int, dtype: torch.dtype) -> Tensor:
        """`[L, 1, N, S]`: 0 where a query sees a slot, else -inf."""
        if window not in self._masks:
            (row_LQ, position_LQ), (row_LS, position_LS) = self._queries, self._keys
            back_LQS = position_LQ[:, :, None] - position_LS[:, None, :]
            own_LQS = row_LQ[:, :, None] == row_LS[:, None, :]
            visible_LQS = (own_LQS | (row_LS == PREFIX)[:, None, :]) & (back_LQS >= 0)
            if window is not None:
                visible_LQS &= back_LQS < window
            mask_LQS = torch.zeros(visible_LQS.shape, dtype=dtype, device=visible_LQS.device)
            mask_LQS.masked_fill_(~visible_LQS, float("-inf"))
            # written out once for all layers: fused kernels want it whole
            self._masks[window] = mask_LQS.repeat(1, num_repeats, 1)[:, None]
        return self._masks[window]


def _lines(new: NewTokens) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """-> line of every token; group and rows of every line, none with too many tokens."""
    starts = np.flatnonzero(np.r_[True, (np.diff(new.groups) != 0) | (np.diff(new.rows) != 0)])
    lengths = np.diff(np.r_[starts, len(new.rows)]).tolist()
    members: list[tuple[int, list[int]]] = []
    line_of_run = []
    num_tokens = 0
    for group, row, length in zip(
        new.groups[starts].tolist(), new.rows[starts].tolist(), lengths, strict=True
    ):
        if not members or members[-1][0] != group or num_tokens + length > _TOKENS_OF_A_LINE:
            members.append((group, []))
            num_tokens = 0
        members[-1][1].append(row)
        num_tokens += length
        line_of_run.append(len(members) - 1)
    return np.repeat(line_of_run, lengths), members


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """Queries are scaled. Some lines at a time."""
    num_heads, num_queries, num_slots = query.shape[1], query.shape[2], key.shape[2]
    size = max(1, _SCORES_AT_ONCE // (num_heads * num_queries * num_slots))
    pieces = []
    for q, k, v, m in zip(*(tensor.split(size) for tensor in (query, key, value, mask)), strict=True):
        scores = ((q / softcap) @ k.mT).tanh_().mul_(softcap).add_(m)
        pieces.append(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)
    return torch.cat(pieces)
