"""The LLaVA record format: a JSON list of `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench.data.stream import Readable, stream_list
from morebench.errors import DataError

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


def iter_records(file: Readable, path: Path) -> Iterator[Sample | DataError]:
    """One record after the other: parsed, or what is wrong with it. Raises DataError for what is no list."""
    for index, element in enumerate(stream_list(file, path)):
        where = f"{path}: record {index}"
        try:
            if element.problem is not None:
                raise DataError(f"{where}: {element.problem}.")
            yield parse_record(element.value, where)
        except DataError as error:
            yield DataError(f"{error} (byte {element.offset})")


def parse_record(raw: object, where: str) -> Sample:
    """`where` opens every error message: the file and the record's index."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: expected an object, found {type(raw).__name__}.")
    record_id = raw.get("id")
    if isinstance(record_id, bool) or not isinstance(record_id, str | int) or record_id == "":
        raise DataError(f"{where}: expected an `id` (text or whole number), found {_found(raw, 'id')}.")
    where = f"{where} (id {str(record_id)!r})"
    images = _parse_images(raw, where)
    turns = _parse_turns(raw, where)
    num_tokens = sum(turn.question.count(IMAGE_TOKEN) for turn in turns)
    if num_tokens != len(images):
        raise DataError(
            f"{where}: {num_tokens} {IMAGE_TOKEN} in its questions but {len(images)} image(s) in `image`; "
            f"write one {IMAGE_TOKEN} per image into the human turns."
        )
    return Sample(str(record_id), images, turns)


def _parse_images(raw: Mapping[Any, Any], where: str) -> tuple[str, ...]:
    images = raw.get("image")
    if images is None:  # text-only; exporters write the missing key as null
        return ()
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError(
            f"{where}: expected `image` to be a relative path or a list of them, "
            f"found {_found(raw, 'image')}; leave the key out of a text-only record."
        )
    return tuple(images)


def _parse_turns(raw: Mapping[Any, Any], where: str) -> tuple[Turn, ...]:
    if "conversations" not in raw:
        raise DataError(f"{where}: no `conversations`; its keys are {', '.join(map(str, raw)) or 'none'}.")
    messages = raw["conversations"]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: expected `conversations` to be a list of messages, "
            f"found {_found(raw, 'conversations')}."
        )
    roles, values = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
            raise DataError(
                f"{where}: message {number} of `conversations` is not an object with `from` and a text "
                f"`value`: {str(message)[:60]!r}."
            )
        _check_text(message["value"], f"{where}: message {number} of `conversations`")
        roles.append(message.get("from"))
        values.append(message["value"])
    if roles[0] == "gpt":  # the study drops an answer that nobody asked for
        roles, values = roles[1:], values[1:]
    expected = [ROLES[number % 2] for number in range(len(roles))]
    if roles != expected or not roles or len(roles) % 2:
        raise DataError(
            f"{where}: roles must alternate human, gpt and end with gpt, found {_shorten(roles)} in `from`."
        )
    return tuple(Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True))


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # the stream writes byte 0xXY that is no UTF-8 as U+DCXY; "\ud83d" alone is valid JSON but no text
        is_byte = 0xDC80 <= ord(text[error.start]) <= 0xDCFF
        what = "a byte that is no UTF-8" if is_byte else "half a surrogate pair"
        raise DataError(f"{where}: {what} at character {error.start}.") from None


def _found(raw: Mapping[Any, Any], key: str) -> str:
    if key not in raw:
        return "none"
    text = repr(raw[key])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shorten(roles: list[Any]) -> str:
    shown = ", ".join(map(str, roles[:6])) or "no message after the leading gpt"
    return shown if len(roles) <= 6 else f"{shown}, ... ({len(roles)} messages)"
