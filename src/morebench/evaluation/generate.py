"""Greedy answers, many at once, that do not depend on which questions were answered beside them."""

from collections.abc import Generator as Pieces
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from morebench.evaluation.chunks import Request, groups_of, plan_chunks, prefix_length
from morebench.evaluation.decoding import NEAR_TIE, Decoding, Row
from morebench.evaluation.model import LoadedModel
from morebench.models.rope import rotation

__all__ = ["NEAR_TIE", "Answer", "Generator", "Request", "generation_attention", "plan_chunks"]


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int  # without the token that ended it
    unreadable_tokens: int  # ids beyond the tokenizer's: rows that only round the LLM's vocabulary up
    near_ties: int  # steps at which the two best tokens were nearly equal
    ended: bool  # False: cut at the length limit


@contextmanager
def generation_attention(llm: PreTrainedModel) -> Iterator[None]:
    """transformers' own attention, to compare with. `Generator` does not need it."""
    training_attention = llm.config._attn_implementation
    # sdpa has no soft-cap: transformers would leave it out.
    has_softcap = getattr(llm.config, "attn_logit_softcapping", None) is not None
    llm.set_attn_implementation("eager" if has_softcap else "sdpa")
    try:
        yield
    finally:
        llm.set_attn_implementation(training_attention)


class Generator:
    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._end_token_ids = frozenset(model.end_token_ids())
        self.out_of_memory = 0  # chunks that were halved

    def answer(self, requests: Sequence[Request], share: bool = True) -> list[Answer]:
        """One chunk's answers, in order. Raises NonFiniteError, and SampleError for an image.

        `share` False: one question at a time, each prompt computed whole.
        """
        try:
            return self._answer(requests, share)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        # outside of `except`: the error holds what fills the memory
        torch.cuda.empty_cache()
        self.out_of_memory += 1
        half = len(requests) // 2
        return [answer for part in (requests[:half], requests[half:]) for answer in self.answer(part, share)]

    def stream(self, request: Request) -> Pieces[str, None, Answer]:
        """The answer's text in pieces, as they come; in the end the answer as `answer` gives it."""
        row, shown = Row(request), ""
        for _ in self._decoding([row], share=True, visual=self._encode([request])).steps():
            text = self._text(row)
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                if text != shown:
                    yield text[len(shown) :]
                shown = text
        (answer,) = self._answers([row])
        if rest := answer.text[len(shown) :]:
            yield rest
        return answer

    def _answer(self, requests: Sequence[Request], share: bool) -> list[Answer]:
        visual = self._encode(requests)
        rows = [Row(request) for request in requests]
        for batch in self._batches(rows) if share else [[row] for row in rows]:
            for _ in self._decoding(batch, share, visual).steps():
                pass
        return self._answers(rows)

    def _answers(self, rows: Sequence[Row]) -> list[Answer]:
        texts = self._model.tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
        size = len(self._model.tokenizer)
        return [
            Answer(
                text,
                len(row.tokens),
                sum(token >= size for token in row.tokens),  # decoding drops them
                row.near_ties,
                row.ended,
            )
            for text, row in zip(texts, rows, strict=True)
        ]

    def _text(self, row: Row) -> str:
        text: str = self._model.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return text

    def _encode(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Image key -> visual tokens `[V, D]`, each image once."""
        images = {image.key: image for request in requests for image in request.images}
        return dict(zip(images, self._model.encode(list(images.values())), strict=True))

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows whose every position is rotated alike, together; one whose answer may change that, alone."""
        config = self._model.mllm.llm.config
        together: dict[int, list[Row]] = {}
        alone = []
        for row in rows:
            first, last = rotation(config, row.length), rotation(config, row.most_positions)
            if first == last:
                together.setdefault(first, []).append(row)
            else:
                alone.append([row])
        return [*together.values(), *alone]

    def _decoding(self, rows: Sequence[Row], share: bool, visual: dict[str, Tensor]) -> Decoding:
        config = self._model.mllm.llm.config

        def shared(request: Request) -> int:
            length, whole = prefix_length(request), len(request.prompt.input_ids)
            return length if share and rotation(config, length) == rotation(config, whole) else 0

        groups = groups_of([row.request for row in rows], shared)
        return Decoding(self._model.mllm, self._end_token_ids, rows, groups, visual)


def count_flips(generator: Generator, requests: Sequence[Request], texts: Sequence[str]) -> int:
    """How many of these texts are others when every question is asked alone, its prompt computed whole."""
    alone = [generator.answer([request], share=False)[0].text for request in requests]
    return sum(text != other for text, other in zip(texts, alone, strict=True))
