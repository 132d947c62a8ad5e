"""The next token of many prompts, again and again, until each has ended."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from morebench.errors import NonFiniteError
from morebench.evaluation.cached_attention import CachedAttention
from morebench.evaluation.chunks import Group, Request
from morebench.evaluation.shared_cache import PREFIX, NewTokens, SharedCache
from morebench.models.attention import VARLEN
from morebench.models.mllm import MLLM
from morebench.models.rope import forget_rotation, rotation

# Two best logits closer than this may change places with the batch, by rounding alone.
NEAR_TIE = 1e-4
# What one pass over the LLM may take beside the cache: hidden states, masks.
_TOKENS_PER_PASS = 16384
# Steps for which a cache has free slots at first; then twice as many each time. Most answers end at once.
_FIRST_ROOM = 4


@dataclass
class Row:
    """A request while it is answered."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    near_ties: int = 0
    ended: bool = False

    @property
    def open(self) -> bool:
        return not self.ended and len(self.tokens) < self.request.max_new_tokens

    @property
    def length(self) -> int:
        """Of prompt and answer so far."""
        return len(self.request.prompt.input_ids) + len(self.tokens)

    @property
    def most_positions(self) -> int:
        """The last token of an answer is read by nobody."""
        return len(self.request.prompt.input_ids) + self.request.max_new_tokens - 1


@dataclass(frozen=True)
class _Piece:
    """Consecutive new tokens of one row, or of a prefix."""

    group: int
    row: int
    start: int  # position in the text
    ids: np.ndarray
    visual_mask: np.ndarray
    visual: tuple[Tensor, ...] = ()  # of every image in it, [V, D]

    def part(self, start: int, end: int | None, row: int) -> "_Piece":
        """All visual tokens lie in one part."""
        mask = self.visual_mask[start:end]
        visual = self.visual if mask.any() else ()
        return _Piece(self.group, row, start, self.ids[start:end], mask, visual)


class Decoding:
    def __init__(
        self,
        mllm: MLLM,
        end_token_ids: Collection[int],
        rows: Sequence[Row],
        groups: Sequence[Group],
        visual: dict[str, Tensor],
    ) -> None:
        """`groups` number the rows. `visual`: image key -> visual tokens `[V, D]`."""
        self._mllm = mllm
        self._end_token_ids = end_token_ids
        self._rows = rows
        self._groups = groups
        self._visual = visual
        self._room = _FIRST_ROOM

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Yields after every token of every row. Raises NonFiniteError."""
        config = self._mllm.llm.config
        self._start(self._groups)
        rotated = {rotation(config, row.length - 1) for row in self._rows}
        while open_rows := [i for i, row in enumerate(self._rows) if row.open]:
            yield
            now = {rotation(config, self._rows[i].length) for i in open_rows}
            if now <= rotated:
                self._next(open_rows)
            else:  # of one row alone
                self._start([Group((0,), 0)])
            rotated = now
        yield

    def _start(self, groups: Sequence[Group]) -> None:
        """Compute prompts, and what is answered so far, from the first token; then the next one."""
        prefixes, questions = [], []
        for number, group in enumerate(groups):
            if group.prefix_length:
                whole = self._whole(group.rows[0], number)
                prefixes.append(whole.part(0, group.prefix_length, PREFIX))
            for i in group.rows:
                questions.append(self._whole(i, number).part(group.prefix_length, None, i))
        own = [sum(len(piece.ids) for piece in questions if piece.group == n) for n in range(len(groups))]
        slots = [
            group.prefix_length + tokens + self._room * len(group.rows)
            for group, tokens in zip(groups, own, strict=True)
        ]
        self._cache = SharedCache(len(groups), max(slots), self._mllm.llm.config.num_hidden_layers)
        self._group_of = {i: number for number, group in enumerate(groups) for i in group.rows}
        forget_rotation(self._mllm.llm)
        for pieces in _passes(prefixes):
            self._compute(pieces)
        for pieces in _passes(questions):
            hidden_TD = self._compute(pieces)
            ends = np.cumsum([len(piece.ids) for piece in pieces]) - 1
            self._take(
                [piece.row for piece in pieces], hidden_TD[torch.from_numpy(ends).to(hidden_TD.device)]
            )

    def _next(self, open_rows: Sequence[int]) -> None:
        new_P = np.bincount([self._group_of[i] for i in open_rows], minlength=len(self._cache.used_P))
        if not self._cache.has_room(new_P) or 2 * np.count_nonzero(new_P) <= len(new_P):
            self._room *= 2
            most = max(self._rows[i].request.max_new_tokens - len(self._rows[i].tokens) for i in open_rows)
            kept = [(self._group_of[i], i) for i in open_rows]
            self._cache, number = self._cache.kept(kept, min(self._room, most))
            self._group_of = {i: number[group] for group, i in kept}
        pieces = [
            _Piece(
                self._group_of[i],
                i,
                self._rows[i].length - 1,
                np.array(self._rows[i].tokens[-1:]),
                np.zeros(1, dtype=bool),
            )
            for i in sorted(open_rows, key=lambda i: self._group_of[i])
        ]
        # every group, even one without an open row
        hidden_RD = self._compute(pieces, groups=(0, len(self._cache.used_P)))
        self._take([piece.row for piece in pieces], hidden_RD)

    def _whole(self, i: int, group: int) -> _Piece:
        row = self._rows[i]
        prompt, more = row.request.prompt, len(row.tokens)
        return _Piece(
            group,
            i,
            0,
            np.concatenate([prompt.input_ids, np.array(row.tokens, dtype=prompt.input_ids.dtype)]),
            np.concatenate([prompt.visual_mask, np.zeros(more, dtype=bool)]),
            tuple(self._visual[image.key] for image in row.request.images),
        )

    def _compute(self, pieces: Sequence[_Piece], groups: tuple[int, int] | None = None) -> Tensor:
        """One pass over the LLM. -> final hidden states `[T, D]`."""
        llm = self._mllm.llm
        device, width = llm.device, llm.config.hidden_size
        lengths = [len(piece.ids) for piece in pieces]
        position_T = np.concatenate([piece.start + np.arange(len(piece.ids)) for piece in pieces])
        ids_T = torch.from_numpy(np.concatenate([piece.ids for piece in pieces]).astype(np.int64)).to(device)
        [visual_positions] = np.concatenate([piece.visual_mask for piece in pieces]).nonzero()
        visual = [tensor for piece in pieces for tensor in piece.visual]
        visual_ND = torch.cat(visual) if visual else torch.zeros(0, width, device=device)
        embeds_TD = self._mllm.embed(ids_T, torch.from_numpy(visual_positions).to(device), visual_ND[None])
        first, last = groups or (pieces[0].group, pieces[-1].group + 1)
        new = NewTokens(
            first,
            last,
            np.repeat([piece.group for piece in pieces], lengths),
            np.repeat([piece.row for piece in pieces], lengths),
            position_T,
        )
        attend = CachedAttention(self._cache, new, device)
        with _packed(llm):
            hidden_TD: Tensor = llm.base_model(
                inputs_embeds=embeds_TD[None],
                position_ids=torch.from_numpy(position_T).to(device)[None],
                use_cache=False,
                cu_seqlens=attend,
            ).last_hidden_state[0]
        return hidden_TD

    def _take(self, rows: Sequence[int], hidden_RD: Tensor) -> None:
        """The next token of every row."""
        logits_RZ = self._mllm.logits(hidden_RD)
        values_R2, ids_R2 = logits_RZ.topk(2)
        finite_R1 = logits_RZ.isfinite().all(-1, keepdim=True)
        # all in one tensor: each transfer waits for the device
        found = torch.cat([part.double() for part in (values_R2, ids_R2, finite_R1)], 1).tolist()
        if not all(finite for *_, finite in found):
            raise NonFiniteError("The LLM's logits are NaN or infinite: its weights are, or bf16 overflowed.")
        for i, (first, second, token, _, _) in zip(rows, found, strict=True):
            row = self._rows[i]
            row.near_ties += first - second < NEAR_TIE
            row.ended = int(token) in self._end_token_ids
            row.tokens += [] if row.ended else [int(token)]


def _passes(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Whole groups up to the limit of one pass, or one group."""
    ready: list[_Piece] = []
    for _, group in groupby(pieces, key=lambda piece: piece.group):
        more = list(group)
        if ready and sum(len(piece.ids) for piece in [*ready, *more]) > _TOKENS_PER_PASS:
            yield ready
            ready = []
        ready += more
    if ready:
        yield ready


@contextmanager
def _packed(llm: PreTrainedModel) -> Iterator[None]:
    """The attention that takes `cu_seqlens`, whatever the caller compares with."""
    former = llm.config._attn_implementation
    if former == VARLEN:
        yield
        return
    llm.set_attn_implementation(VARLEN)
    try:
        yield
    finally:
        llm.set_attn_implementation(former)
