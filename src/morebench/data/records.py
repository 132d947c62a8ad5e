"""The LLaVA record format: a JSON list of `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`."""

from collections.abc import Mapping
from dataclasses import dataclass
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from morebench.errors import DataError, join_problems

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


def read_records(path: Path) -> list[Sample]:
    """Raises one DataError that lists every bad record."""
    return parse_records(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such records file; expected a JSON list of records there.") from None
    except OSError as error:
        raise DataError(f"{path}: the records file cannot be read: {error.strerror or error}.") from None


def parse_records(content: bytes, path: Path) -> list[Sample]:
    records = _load_json_list(content, path)
    samples, problems = [], []
    for index, raw in enumerate(records):
        try:
            samples.append(parse_record(raw, f"{path}: record {index}"))
        except DataError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        head = f"{len(problems)} of {len(records)} records in {path} cannot be used:"
        raise DataError(f"{head}\n{join_problems(problems)}")
    return samples


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


def _load_json_list(content: bytes, path: Path) -> list[Any]:
    try:
        records = loads(content)
    except JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error}; expected a list of records.") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON text in UTF-8: {error}.") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of records, found {type(records).__name__}.")
    if not records:
        raise DataError(f"{path}: the list of records is empty; expected at least one.")
    return records


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
    except UnicodeEncodeError as error:  # "\ud83d" alone is valid JSON but no tokenizer takes it
        raise DataError(f"{where}: half a surrogate pair at character {error.start}.") from None


def _found(raw: Mapping[Any, Any], key: str) -> str:
    if key not in raw:
        return "none"
    text = repr(raw[key])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shorten(roles: list[Any]) -> str:
    shown = ", ".join(map(str, roles[:6])) or "no message after the leading gpt"
    return shown if len(roles) <= 6 else f"{shown}, ... ({len(roles)} messages)"
