"""A JSON list element by element, whatever the file's size, each with its place in the file."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from morebench.data.findings import printable
from morebench.data.nesting import MAX_DEPTH, Skipper, is_too_deep
from morebench.errors import DataError

CHUNK = 1 << 20  # bytes read at once; doubled until an element is whole
MAX_ELEMENT = 16 << 20  # characters; no record of a conversation comes near
_NO_SPACE = re.compile(r"[^ \t\n\r]")
# What is no JSON yet may become it when it goes on; but for texts "-Infinity" is the longest such piece.
_PIECE = 16


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Element(NamedTuple):
    offset: int  # of its first byte in the file
    value: Any  # None where the problem is its size or depth
    problem: str | None  # it is JSON, but none that can be used


def stream_list(file: Readable, path: Path) -> Iterator[Element]:
    """Raises DataError where the file stops being a JSON list: nothing behind that place can be trusted.

    An element that is too long or nested too deeply is read over in bounded memory; within it only the
    brackets are followed.
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
    """The part of a file's text that is looked at. Bytes that are no UTF-8 are lone surrogates in it."""

    def __init__(self, file: Readable, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0  # in _text
        self._offset = 0  # in the file, of _text[_at]
        self._ended = False
        self._flaw: str | None = None  # the first of the element
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int
        )

    def peek(self) -> str | None:
        """The next character that is no white space; None at the end of the file."""
        while True:
            found = _NO_SPACE.search(self._text, self._at)
            end = len(self._text) if found is None else found.start()
            self._offset += end - self._at
            self._at = end
            if found is not None:
                return found[0]
            if self._ended:
                return None
            self._read()

    def skip(self, characters: int) -> None:
        """Of what was peeked at."""
        passed = self._text[self._at : self._at + characters]
        self._offset += len(passed) if passed.isascii() else len(_encoded(passed))
        self._at += characters

    def element(self) -> Element:
        while True:
            self._flaw = None
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or self._is_certain(error):
                    raise self._syntax_error(error) from None
                if len(self._text) - self._at > MAX_ELEMENT + _PIECE:
                    return self._too_long()
            except RecursionError:
                return self._read_over(f"nested deeper than {MAX_DEPTH} levels")
            else:
                # a number could go on in the next chunk: 1 with .5, 1.5 with e+3
                if self._ended or self._text[end - 1] in '"]}' or len(self._text) - end >= _PIECE:
                    return self._pass(value, end)
                if len(self._text) - self._at > MAX_ELEMENT + _PIECE:
                    return self._too_long()
            self._read()

    def error(self, reason: str) -> DataError:
        return DataError(f"{self._path}: not valid JSON: {reason} at byte {self._offset}.")

    def _is_certain(self, error: json.JSONDecodeError) -> bool:
        """Whether no more text can mend it."""
        return not error.msg.startswith("Unterminated string") and error.pos + _PIECE <= len(self._text)

    def _syntax_error(self, error: json.JSONDecodeError) -> DataError:
        at = self._offset + len(_encoded(self._text[self._at : error.pos]))
        within = "" if at == self._offset else f", in the record that begins at byte {self._offset}"
        return DataError(
            f"{self._path}: not valid JSON: {error.msg.removesuffix(' at')} at byte {at}{within}."
        )

    def _pass(self, value: Any, end: int) -> Element:
        raw = self._text[self._at : end]
        offset, problem = self._offset, self._flaw
        try:
            num_bytes = len(raw) if raw.isascii() else len(raw.encode())
        except UnicodeEncodeError as error:
            num_bytes = len(_encoded(raw))
            at = offset + len(_encoded(raw[: error.start]))
            problem = f"byte 0x{ord(raw[error.start]) - 0xDC00:x} at byte {at} is no UTF-8"
        if len(raw) > MAX_ELEMENT:
            value, problem = None, _long()
        elif is_too_deep(raw):
            value, problem = None, f"nested deeper than {MAX_DEPTH} levels"
        self._offset += num_bytes
        self._at = end
        return Element(offset, value, problem)

    def _too_long(self) -> Element:
        return self._read_over(_long())

    def _read_over(self, problem: str) -> Element:
        offset, skipper = self._offset, Skipper()
        while (end := skipper.end(self._text, self._at)) is None:
            self.skip(len(self._text) - self._at)
            if self._ended:
                if skipper.is_scalar:
                    return Element(offset, None, problem)
                raise DataError(
                    f"{self._path}: not valid JSON: the file ends in the record that begins at byte {offset}."
                )
            self._read()
        self.skip(end - self._at)
        return Element(offset, None, problem)

    def _read(self) -> None:
        """At least as much again as there is: an element that needs n bytes is then decoded log n times."""
        kept = self._text[self._at :]
        content = self._file.read(max(CHUNK, len(kept)))
        self._ended = not content
        self._text, self._at = kept + self._decoder.decode(content, final=self._ended), 0

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            self._found_flaw(f"the same key twice: {printable(', '.join(twice))}")
        return made

    def _constant(self, name: str) -> None:
        self._found_flaw(f"{name} is no value that JSON knows")

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's bound on the length
            self._found_flaw(f"a number of {len(digits)} digits")
            return 0

    def _found_flaw(self, flaw: str) -> None:
        self._flaw = self._flaw or flaw


def _long() -> str:
    return f"longer than {MAX_ELEMENT:,} characters"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
