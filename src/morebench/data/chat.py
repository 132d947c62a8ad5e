"""Chat formats are data: a list of segments with an explicit trained flag (conf/chat_formats)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.data.segments import BOS, Segment, split_at_images, swallow_spaces, text_tokenizer
from morebench.errors import ConfigError, DataError, join_problems

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_KEYS = ("label", "start", "turn", "trim", "stop")
_ANY_PLACEHOLDER = re.compile(r"\{[a-z_]+\}")
_PLACEHOLDER = re.compile(r"\{question\}|\{answer\}")


@dataclass(frozen=True)
class Encoded:
    input_ids: np.ndarray  # int32 [T]; 0 at visual tokens
    supervised: np.ndarray  # bool [T]
    visual_mask: np.ndarray  # bool [T]
    truncated: bool


class Counts(NamedTuple):
    length: int  # tokens, visual ones included
    supervised: int  # supervised tokens that are predicted: a first token never is
    truncated: bool


_Span = tuple[int, bool, bool]  # tokens; whether they are an image's; whether they are supervised


@dataclass(frozen=True)
class ChatFormat:
    label: str
    start: tuple[Segment, ...]  # once, in front
    turn: tuple[Segment, ...]  # for every question and its answer
    trim: bool  # the family's own template strips questions and answers
    stop: tuple[str, ...] = ()  # control tokens that end an answer beside its end mark and EOS

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ChatFormat":
        """Raises ConfigError. The layout of the YAML files stands in conf/chat_formats/plain.yaml."""
        label = raw.get("label", "without label")
        if unknown := sorted(raw.keys() - set(_KEYS)):
            raise ConfigError(f"Chat format {label!r}: unknown keys {unknown}; known: {', '.join(_KEYS)}.")
        start = tuple(_segment(item, label) for item in raw.get("start") or [])
        turn = tuple(_segment(item, label) for item in raw.get("turn") or [])
        if [s.trained for s in turn if "{answer}" in s.text] != [True]:
            raise ConfigError(
                f"Chat format {label!r}: `turn` needs exactly one trained text with {{answer}}."
            )
        names = [name for s in (*start, *turn) for name in _ANY_PLACEHOLDER.findall(s.text)]
        if other := sorted({name for name in names if not _PLACEHOLDER.fullmatch(name)}):
            raise ConfigError(
                f"Chat format {label!r}: {', '.join(other)} is filled by nothing. There are: "
                "{question}, {answer}."
            )
        if any(_PLACEHOLDER.search(s.text) for s in start) or any(
            s.trained and "{question}" in s.text for s in turn
        ):
            raise ConfigError(
                f"Chat format {label!r}: {{question}} belongs into an untrained text of `turn`."
            )
        stop = raw.get("stop") or []
        if not isinstance(stop, list) or not all(isinstance(token, str) for token in stop):
            raise ConfigError(f"Chat format {label!r}: `stop` is a list of control tokens, found {stop!r}.")
        return cls(label, start, turn, bool(raw.get("trim", False)), tuple(stop))

    def encode(
        self, sample: Sample, tokenizer: "Tokenizer", num_visual_tokens: int, max_length: int
    ) -> Encoded:
        """Training ids. Raises DataError if images would be left over or cut."""
        segments, where = self._segments(sample.turns), f"record id {sample.id!r}"
        return self._encode(segments, tokenizer, num_visual_tokens, len(sample.images), max_length, where)

    def count(
        self, samples: Sequence[Sample], tokenizer: "Tokenizer", num_visual_tokens: int, max_length: int
    ) -> list[Counts | DataError]:
        """What `encode` would give or raise, counted, for many samples at once."""
        text = text_tokenizer(tokenizer)
        pieces = [swallow_spaces(split_at_images(self._segments(one.turns)), text.added) for one in samples]
        found: list[Counts | DataError] = []
        for sample, sizes in zip(samples, text.count(pieces, self.control_ids(tokenizer)), strict=True):
            spans = [(num_visual_tokens if n is None else n, n is None, trained) for n, trained in sizes]
            try:
                where = f"record id {sample.id!r}"
                self._check(spans, num_visual_tokens, len(sample.images), max_length, where)
            except DataError as error:
                found.append(error)
                continue
            found.append(_counts(spans, max_length))
        return found

    def encode_prompt(
        self, question: str, tokenizer: "Tokenizer", num_visual_tokens: int, as_written: bool = False
    ) -> Encoded:
        """The first ids of `encode` for a sample that opens with `question`, up to its answer.

        `as_written`: a single image keeps its place in the question, as in the study's evaluation. No
        difference for a question that is the image, a newline and a text without white space around it.
        """
        asked = question if as_written else _place_image(question)
        return self._encode_open([], asked, tokenizer, num_visual_tokens)

    def encode_conversation(
        self, turns: Sequence[Turn], question: str, tokenizer: "Tokenizer", num_visual_tokens: int
    ) -> Encoded:
        """The first ids of `encode` for a sample of these turns and then one that opens with `question`."""
        return self._encode_open(turns, _place_image(question), tokenizer, num_visual_tokens)

    def _encode_open(
        self, turns: Sequence[Turn], asked: str, tokenizer: "Tokenizer", num_visual_tokens: int
    ) -> Encoded:
        opening = takewhile(lambda segment: "{answer}" not in segment.text, self.turn)
        segments = [*self._segments(turns), *self._fill(opening, Turn(asked, ""))]
        where = f"question {asked[:60]!r}"
        num_images = sum(text.count(IMAGE_TOKEN) for text in (*(turn.question for turn in turns), asked))
        return self._encode(segments, tokenizer, num_visual_tokens, num_images, None, where)

    def end_token_ids(self, tokenizer: "Tokenizer") -> list[int]:
        """Ids that end an answer: its end mark (the control token trained next), `stop`, and the EOS."""
        control_ids = self.control_ids(tokenizer)
        after = [segment for segment in self.turn if segment.trained and "{answer}" not in segment.text]
        marks = [after[0].token] if after and after[0].token else []
        ends = [token_id for token in (*marks, *self.stop) for token_id in control_ids[token]]
        if tokenizer.eos_token_id is not None:
            ends.append(tokenizer.eos_token_id)
        return list(dict.fromkeys(ends))

    def check(self, tokenizer: "Tokenizer") -> None:
        """Raises one ConfigError for all that a tokenizer can't write of this format.

        White space that control tokens swallow is dropped as the family's own tokenizer drops it. Where that
        is untrained it is harmless, but a format must not promise to train what never reaches the loss.
        """
        self.control_ids(tokenizer)
        segments = [
            *self.start,
            *self._fill(self.turn, Turn("Q", "A")),
            *self._fill(self.turn, Turn("Q", "A")),
        ]
        written = split_at_images(segments)
        left = swallow_spaces(written, text_tokenizer(tokenizer).added)
        problems = dict.fromkeys(
            f"Chat format {self.label!r} trains the text {before.text!r} (with A for an answer), but control "
            f"tokens in the tokenizer of {tokenizer.name_or_path or 'this LLM'} swallow white space beside "
            f"them and leave {after.text!r}. Take that white space out of the format."
            for before, after in zip(written, left, strict=True)
            if before is not None and after is not None and before.trained and before.text != after.text
        )
        if problems:
            raise ConfigError(join_problems(problems))

    def _segments(self, turns: Sequence[Turn]) -> list[Segment]:
        segments = [*self.start]
        for turn in turns:
            segments += self._fill(self.turn, Turn(_place_image(turn.question), turn.answer))
        return segments

    def _fill(self, segments: "Sequence[Segment] | Iterator[Segment]", turn: Turn) -> list[Segment]:
        question, answer = turn.question, turn.answer
        if self.trim:
            question, answer = question.strip(), answer.strip()
        values = {"{question}": question, "{answer}": answer}
        return [
            Segment(s.token, _PLACEHOLDER.sub(lambda match: values[match.group()], s.text), s.trained)
            if "{" in s.text
            else s
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
        text = text_tokenizer(tokenizer)
        pieces = swallow_spaces(split_at_images(segments), text.added)
        ids: list[int] = []
        spans: list[_Span] = []
        for new, trained in text.encode(pieces, self.control_ids(tokenizer)):
            size = num_visual_tokens if new is None else len(new)
            ids += [0] * size if new is None else new
            spans.append((size, new is None, trained))
        self._check(spans, num_visual_tokens, num_images, max_length, where)
        sizes, visual, supervised = zip(*spans, strict=True) if spans else ((), (), ())
        return Encoded(
            np.array(ids[:max_length], np.int32),
            np.repeat(np.array(supervised, np.bool_), sizes)[:max_length],
            np.repeat(np.array(visual, np.bool_), sizes)[:max_length],
            max_length is not None and len(ids) > max_length,
        )

    def _check(
        self,
        spans: "Sequence[_Span]",
        num_visual_tokens: int,
        num_images: int,
        max_length: int | None,
        where: str,
    ) -> None:
        """Raises DataError."""
        length, images, last_visual = 0, 0, 0
        for size, is_image, _ in spans:
            length += size
            if is_image:
                images, last_visual = images + 1, length
        if images != num_images:
            raise DataError(
                f"{where}: chat format {self.label!r} makes room for {images} image(s), the sample has "
                f"{num_images}."
            )
        if max_length is not None and last_visual > max_length:
            raise DataError(
                f"{where}: its visual tokens do not fit into max_length={max_length}; "
                f"the last one is token {last_visual}. Raise max_length."
            )

    def control_ids(self, tokenizer: "Tokenizer") -> dict[str, list[int]]:
        """Control token -> its id; {bos} -> none where the tokenizer has no BOS of its own."""
        names = {s.token: None for s in (*self.start, *self.turn) if s.token is not None} | dict.fromkeys(
            self.stop
        )
        found: dict[str, list[int]] = {}
        missing = []
        for name in names:
            if name == BOS:
                # the Phi families name a BOS that is their EOS, and never write it in front
                written = tokenizer.bos_token_id not in (None, tokenizer.eos_token_id)
                found[name] = [tokenizer.bos_token_id] if written else []
                continue
            token_id = cast(int | None, tokenizer.convert_tokens_to_ids(name))
            if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != name:
                missing.append(name)
            else:
                found[name] = [token_id]
        if missing:
            raise ConfigError(
                f"Chat format {self.label!r} uses tokens which the tokenizer of "
                f"{tokenizer.name_or_path or 'this LLM'} does not have: {', '.join(map(repr, missing))}. "
                "Choose the llm's own chat_format."
            )
        return found


def _counts(spans: Sequence[_Span], max_length: int) -> Counts:
    length = supervised = 0
    for size, _, is_supervised in spans:
        if is_supervised:
            supervised += max(0, min(length + size, max_length) - max(length, 1))
        length += size
    return Counts(min(length, max_length), supervised, length > max_length)


def _segment(item: Mapping[str, Any], label: str) -> Segment:
    if not isinstance(item, Mapping) or (item.keys() & {"token", "text"}) not in ({"token"}, {"text"}):
        raise ConfigError(f"Chat format {label!r}: a segment is `token: ...` or `text: ...`, found {item!r}.")
    if unknown := sorted(item.keys() - {"token", "text", "trained"}):
        raise ConfigError(f"Chat format {label!r}: unknown keys {unknown} in {item!r}.")
    return Segment(item.get("token"), item.get("text", ""), bool(item.get("trained", False)))


def _place_image(question: str) -> str:
    """LLaVA's pre-pass over training records: a turn's one image goes in front. Several keep their places."""
    if question.count(IMAGE_TOKEN) != 1:
        return question
    return f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()
