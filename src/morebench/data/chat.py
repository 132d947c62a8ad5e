"""Chat formats are data: a list of segments with an explicit trained flag (conf/chat_formats)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.errors import ConfigError, DataError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

BOS = "{bos}"
_PLACEHOLDER = re.compile(r"\{question\}|\{answer\}")


@dataclass(frozen=True)
class Segment:
    """Either one control token or a text template."""

    token: str | None
    text: str
    trained: bool


@dataclass(frozen=True)
class Encoded:
    input_ids: np.ndarray  # int32 [T]; 0 at visual tokens
    supervised: np.ndarray  # bool [T]
    visual_mask: np.ndarray  # bool [T]
    truncated: bool


@dataclass(frozen=True)
class ChatFormat:
    label: str
    start: tuple[Segment, ...]  # once, in front
    turn: tuple[Segment, ...]  # for every question and its answer
    trim: bool  # the family's own template strips questions and answers

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ChatFormat":
        """Raises ConfigError. The layout of the YAML files stands in conf/chat_formats/plain.yaml."""
        label = raw.get("label", "without label")
        if unknown := sorted(raw.keys() - {"label", "start", "turn", "trim"}):
            raise ConfigError(
                f"Chat format {label!r}: unknown keys {unknown}; known: label, start, turn, trim."
            )
        start = tuple(_segment(item, label) for item in raw.get("start") or [])
        turn = tuple(_segment(item, label) for item in raw.get("turn") or [])
        if [s.trained for s in turn if "{answer}" in s.text] != [True]:
            raise ConfigError(
                f"Chat format {label!r}: `turn` needs exactly one trained text with {{answer}}."
            )
        if any(_PLACEHOLDER.search(s.text) for s in start) or any(
            s.trained and "{question}" in s.text for s in turn
        ):
            raise ConfigError(
                f"Chat format {label!r}: {{question}} belongs into an untrained text of `turn`."
            )
        return cls(label, start, turn, bool(raw.get("trim", False)))

    def encode(
        self, sample: Sample, tokenizer: "Tokenizer", num_visual_tokens: int, max_length: int
    ) -> Encoded:
        """Training ids. Raises DataError if images would be left over or cut."""
        segments = [*self.start]
        for turn in sample.turns:
            segments += self._fill(self.turn, turn)
        where = f"record id {sample.id!r}"
        return self._encode(segments, tokenizer, num_visual_tokens, len(sample.images), max_length, where)

    def encode_prompt(self, question: str, tokenizer: "Tokenizer", num_visual_tokens: int) -> Encoded:
        """The first ids of `encode` for a sample that opens with `question`, up to its answer."""
        opening = takewhile(lambda segment: "{answer}" not in segment.text, self.turn)
        segments = [*self.start, *self._fill(opening, Turn(question, ""))]
        where = f"question {question[:60]!r}"
        num_images = question.count(IMAGE_TOKEN)
        return self._encode(segments, tokenizer, num_visual_tokens, num_images, None, where)

    def end_token_ids(self, tokenizer: "Tokenizer") -> list[int]:
        """Ids that end an answer: the control token trained right after it, and the tokenizer's EOS."""
        after = [segment for segment in self.turn if segment.trained and "{answer}" not in segment.text]
        ends = [self._control_id(after[0].token, tokenizer)] if after and after[0].token else []
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        return ends

    def _fill(self, segments: "Sequence[Segment] | Iterator[Segment]", turn: Turn) -> list[Segment]:
        question, answer = _place_image(turn.question), turn.answer
        if self.trim:
            question, answer = question.strip(), answer.strip()
        values = {"{question}": question, "{answer}": answer}
        return [
            Segment(s.token, _PLACEHOLDER.sub(lambda match: values[match.group()], s.text), s.trained)
            for s in segments
        ]

    def _encode(
        self,
        segments: Sequence[Segment],
        tokenizer: "Tokenizer",
        num_visual_tokens: int,
        num_images: int,
        max_length: int | None,
        where: str,
    ) -> Encoded:
        ids, supervised, visual = self._tokenize(segments, tokenizer, num_visual_tokens)
        if sum(visual) != num_images * num_visual_tokens:
            raise DataError(
                f"{where}: chat format {self.label!r} makes room for {sum(visual) // num_visual_tokens} "
                f"image(s), the sample has {num_images}."
            )
        truncated = max_length is not None and len(ids) > max_length
        if truncated and any(visual[max_length:]):
            raise DataError(
                f"{where}: its visual tokens do not fit into max_length={max_length}; "
                f"the last one is token {len(visual) - visual[::-1].index(True)}. Raise max_length."
            )
        return Encoded(
            np.array(ids[:max_length], np.int32),
            np.array(supervised[:max_length], np.bool_),
            np.array(visual[:max_length], np.bool_),
            truncated,
        )

    def _tokenize(
        self, segments: Sequence[Segment], tokenizer: "Tokenizer", num_visual_tokens: int
    ) -> tuple[list[int], list[bool], list[bool]]:
        pieces: list[tuple[list[int] | str | None, bool]] = []  # ids, text, or None for one image
        for segment in _join_texts(segments):
            if segment.token is not None:
                pieces.append((self._token_ids(segment.token, tokenizer), segment.trained))
                continue
            # an image token in an answer is text: nothing would fill it
            chunks = [segment.text] if segment.trained else segment.text.split(IMAGE_TOKEN)
            for number, chunk in enumerate(chunks):
                if number:
                    pieces.append((None, False))
                pieces += [(part, segment.trained) for part in self._defuse(chunk, tokenizer)]
        texts = [piece for piece, _ in pieces if isinstance(piece, str)]
        # one call for a whole sample: the call costs more than the text
        text_ids = iter(
            tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if texts
            else []
        )
        ids: list[int] = []
        supervised: list[bool] = []
        visual: list[bool] = []
        for piece, trained in pieces:
            if piece is None:
                new = [0] * num_visual_tokens
            else:
                new = next(text_ids) if isinstance(piece, str) else piece
            ids += new
            supervised += [trained] * len(new)
            visual += [piece is None] * len(new)
        return ids, supervised, visual

    def _defuse(self, text: str, tokenizer: "Tokenizer") -> list[str]:
        """Cuts a literal control token in the text apart, where `split_special_tokens` does not.

        That leaves alone what a tokenizer adds without calling it special, as DeepSeek's role marks.
        """
        tokens = {s.token for s in (*self.start, *self.turn) if s.token is not None and s.token != BOS}
        cuts = {0, len(text)}
        for token in tokens:
            if token not in text:
                continue
            if not tokenizer.added_tokens_decoder[self._control_id(token, tokenizer)].special:
                cuts |= {match.start() + 1 for match in re.finditer(re.escape(token), text)}
        return [text[a:b] for a, b in pairwise(sorted(cuts))]

    def _token_ids(self, token: str, tokenizer: "Tokenizer") -> list[int]:
        if token != BOS:
            return [self._control_id(token, tokenizer)]
        # the Phi families name a BOS that is their EOS, and never write it in front
        has_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id
        return [tokenizer.bos_token_id] if has_bos else []

    def _control_id(self, token: str, tokenizer: "Tokenizer") -> int:
        token_id = cast(int | None, tokenizer.convert_tokens_to_ids(token))
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ConfigError(
                f"Chat format {self.label!r} uses the token {token!r}, which the tokenizer of "
                f"{tokenizer.name_or_path or 'this LLM'} does not have. Choose the llm's own chat_format."
            )
        return token_id


def _segment(item: Mapping[str, Any], label: str) -> Segment:
    if not isinstance(item, Mapping) or (item.keys() & {"token", "text"}) not in ({"token"}, {"text"}):
        raise ConfigError(f"Chat format {label!r}: a segment is `token: ...` or `text: ...`, found {item!r}.")
    if unknown := sorted(item.keys() - {"token", "text", "trained"}):
        raise ConfigError(f"Chat format {label!r}: unknown keys {unknown} in {item!r}.")
    return Segment(item.get("token"), item.get("text", ""), bool(item.get("trained", False)))


def _place_image(question: str) -> str:
    """LLaVA's pre-pass: a turn's one image goes in front. Several images keep their places."""
    if question.count(IMAGE_TOKEN) != 1:
        return question
    return f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()


def _join_texts(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbouring texts become one, so that they are tokenized as the family's own template would be."""
    pending: Segment | None = None
    for segment in segments:
        joins = pending is not None and pending.token is None and segment.token is None
        if pending is not None and joins and pending.trained == segment.trained:
            pending = Segment(None, pending.text + segment.text, segment.trained)
            continue
        if pending is not None:
            yield pending
        pending = segment
    if pending is not None:
        yield pending
