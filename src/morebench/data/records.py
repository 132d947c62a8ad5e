"""The LLaVA record format: a JSON list of `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from morebench.data.findings import Finding, Kind, SampleError, printable
from morebench.data.stream import Readable, stream_list

IMAGE_TOKEN = "<image>"
ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Turn:
    question: str  # may contain image tokens
    answer: str


@dataclass(frozen=True)
class Sample:
    id: str
    images: tuple[str, ...]  # relative paths, in the order of the image tokens
    turns: tuple[Turn, ...]


class Parsed(NamedTuple):
    sample: Sample
    record: int  # number in the file, from 0
    offset: int  # of its first byte in the file


def iter_records(file: Readable, path: Path) -> Iterator[Parsed | Finding]:
    """One record after the other: parsed, or what is wrong with it. Raises DataError for what is no list."""
    for number, element in enumerate(stream_list(file, path)):
        try:
            if element.problem is not None:
                raise SampleError(Kind.malformed, f"{element.problem}.")
            yield Parsed(parse_record(element.value), number, element.offset)
        except SampleError as error:
            named = _find_id(element.value)
            record_id = None if named is None else printable(named)
            yield Finding(error.kind, printable(error.reason), number, element.offset, record_id)


def parse_record(raw: object) -> Sample:
    """Raises SampleError."""
    if not isinstance(raw, Mapping):
        raise SampleError(Kind.malformed, f"expected an object, found {type(raw).__name__}.")
    record_id = _find_id(raw)
    if record_id is None:
        raise SampleError(
            Kind.malformed, f"expected an `id` (text or whole number), found {_found(raw, 'id')}."
        )
    _check_text(record_id, "`id`")
    images = _parse_images(raw)
    turns = _parse_turns(raw)
    num_tokens = sum(turn.question.count(IMAGE_TOKEN) for turn in turns)
    if num_tokens != len(images):
        raise SampleError(
            Kind.image_count,
            f"{num_tokens} {IMAGE_TOKEN} in its questions but {len(images)} image(s) in `image`; "
            f"write one {IMAGE_TOKEN} per image into the human turns.",
        )
    for number, turn in enumerate(turns):
        if not any(letter.isprintable() and not letter.isspace() for letter in turn.answer):
            raise SampleError(
                Kind.empty_answer, f"answer {number} is {_shown(turn.answer)}; expected a text to learn."
            )
    return Sample(record_id, images, turns)


def _find_id(raw: object) -> str | None:
    record_id = raw.get("id") if isinstance(raw, Mapping) else None
    if isinstance(record_id, bool) or not isinstance(record_id, str | int) or record_id == "":
        return None
    return str(record_id)


def _parse_images(raw: Mapping[Any, Any]) -> tuple[str, ...]:
    images = raw.get("image")
    if images is None:  # text-only; exporters write the missing key as null
        return ()
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise SampleError(
            Kind.malformed,
            "expected `image` to be a relative path or a list of them, "
            f"found {_found(raw, 'image')}; leave the key out of a text-only record.",
        )
    for image in images:
        _check_text(image, "`image`")
    return tuple(images)


def _parse_turns(raw: Mapping[Any, Any]) -> tuple[Turn, ...]:
    if "conversations" not in raw:
        raise SampleError(
            Kind.malformed, f"no `conversations`; its keys are {', '.join(map(str, raw)) or 'none'}."
        )
    messages = raw["conversations"]
    if not isinstance(messages, list) or not messages:
        raise SampleError(
            Kind.malformed,
            f"expected `conversations` to be a list of messages, found {_found(raw, 'conversations')}.",
        )
    roles, values = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
            raise SampleError(
                Kind.malformed,
                f"message {number} of `conversations` is not an object with `from` and a text "
                f"`value`: {_shown(message)}.",
            )
        _check_text(message["value"], f"message {number} of `conversations`")
        roles.append(message.get("from"))
        values.append(message["value"])
    if roles[0] == "gpt":  # the study drops an answer that nobody asked for
        roles, values = roles[1:], values[1:]
    expected = [ROLES[number % 2] for number in range(len(roles))]
    if roles != expected or not roles or len(roles) % 2:
        raise SampleError(
            Kind.turns, f"roles must alternate human, gpt and end with gpt, found {_told(roles)} in `from`."
        )
    return tuple(Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True))


def _check_text(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud83d" is valid JSON, but alone it is no text
        raise SampleError(
            Kind.malformed, f"{where}: half a surrogate pair at character {error.start}."
        ) from None


def _found(raw: Mapping[Any, Any], key: str) -> str:
    return _shown(raw[key]) if key in raw else "none"


def _shown(value: object) -> str:
    if isinstance(value, str):
        value = value[:60]  # before it is copied with every quotation mark escaped
    return printable(repr(value), 60)


def _told(roles: list[Any]) -> str:
    shown = ", ".join(role if isinstance(role, str) else _shown(role) for role in roles[:6])
    shown = shown or "no message after the leading gpt"
    return shown if len(roles) <= 6 else f"{shown}, ... ({len(roles)} messages)"
