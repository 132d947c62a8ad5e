"""A JSON list element by element, whatever the file's size, each with its place in the file."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from morebench.errors import DataError

CHUNK = 1 << 20  # bytes read at once; doubled until an element is whole
MAX_ELEMENT = 64 << 20  # characters; no record of a conversation comes near
_SPACE = " \t\n\r"
_ENDS = tuple(f",]{_SPACE}")


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Element:
    offset: int  # of its first byte in the file
    value: Any
    problem: str | None  # it is JSON, but not as the standard has it


def stream_list(file: Readable, path: Path) -> Iterator[Element]:
    """Raises DataError where the file stops being a JSON list: nothing behind that place can be trusted.

    Bytes that are no UTF-8 come out as lone surrogates, which no text of a record may hold.
    """
    text = _Window(file, path)
    opening = text.peek()
    if opening == "\ufeff":
        text.skip(1)
        opening = text.peek()
    if opening != "[":
        raise DataError(f"{path}: expected a JSON list of records, found {_found(opening)}.")
    text.skip(1)
    separator: str | None = None
    while True:
        following = text.peek()
        if following == "]" and separator != ",":
            text.skip(1)
            break
        yield text.element()
        separator = text.peek()
        if separator not in (",", "]"):
            raise text.error(f"expected a comma or the end of the list, found {_found(separator)}")
        text.skip(separator == ",")
    if (behind := text.peek()) is not None:
        raise text.error(f"something follows the end of the list: {_found(behind)}")


def _found(character: str | None) -> str:
    if character is None:
        return "the end of the file"
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"byte 0x{ord(character) - 0xDC00:x}, which is no UTF-8"
    return "an object" if character == "{" else repr(character)


class _Window:
    """The part of a file's text that is being looked at."""

    def __init__(self, file: Readable, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0  # in _text
        self._offset = 0  # in the file, of _text[_at]
        self._ended = False
        self._flaws: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def peek(self) -> str | None:
        """The next character that is no white space; None at the end of the file."""
        while True:
            start = self._at
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            self._offset += self._at - start
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return None
            self._read()

    def skip(self, characters: int) -> None:
        """Of what was peeked at."""
        self._offset += len(_encoded(self._text[self._at : self._at + characters]))
        self._at += characters

    def element(self) -> Element:
        while True:
            self._flaws.clear()
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    at = self._offset + len(_encoded(self._text[self._at : error.pos]))
                    raise DataError(f"{self._path}: not valid JSON: {error.msg} at byte {at}.") from None
                if self._is_full():
                    raise self.error(f"a record does not end within {MAX_ELEMENT:,} characters") from None
            except RecursionError:
                raise self.error("a record is nested too deeply") from None
            else:
                # a number could go on: with a fraction, or in the next chunk
                if self._ended or self._is_full() or self._text[end : end + 1] in _ENDS:
                    return self._pass(value, end)
            self._read()

    def _is_full(self) -> bool:
        return len(self._text) - self._at > MAX_ELEMENT

    def error(self, reason: str) -> DataError:
        return DataError(f"{self._path}: not valid JSON: {reason} at byte {self._offset}.")

    def _pass(self, value: Any, end: int) -> Element:
        element = Element(self._offset, value, self._flaws[0] if self._flaws else None)
        self.skip(end - self._at)
        return element

    def _read(self) -> None:
        """At least as much again as there is: an element that needs n bytes is then decoded log n times."""
        kept = self._text[self._at :]
        content = self._file.read(max(CHUNK, len(kept)))
        self._ended = not content
        self._text, self._at = kept + self._decoder.decode(content, final=self._ended), 0

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            self._flaws.append(f"the same key twice: {', '.join(twice)}")
        return made

    def _constant(self, name: str) -> None:
        self._flaws.append(f"{name} is no value that JSON knows")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
