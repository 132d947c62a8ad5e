"""A JSON list read element by element: what `json` gives, for any file and any size of chunk."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories_data import record
from hypothesis import given, settings
from hypothesis import strategies as st

from morebench.data import stream
from morebench.data.findings import Finding
from morebench.data.nesting import MAX_DEPTH, Skipper
from morebench.data.records import Parsed, iter_records
from morebench.data.stream import Element, stream_list
from morebench.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


class Pieces:
    """A file of any size that is nowhere."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, None)) is not None:
            self._rest += piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def streamed(content: bytes, chunk: int = 1 << 20, longest: int = 1 << 20) -> list[Element]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        patch.setattr(stream, "MAX_ELEMENT", longest)
        return list(stream_list(Pieces(iter([content])), Path("x.json")))


def depth(value: Any) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth, inner), default=0)
    return 0


@given(
    elements=st.lists(json_values, max_size=6),
    chunk=st.integers(1, 40),
    longest=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    bom=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_stream_gives_what_json_gives(
    elements: list[Any], chunk: int, longest: int, ascii_only: bool, indent: int | None, bom: bool
):
    content = json.dumps(elements, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8-sig" if bom else "utf-8"
    )
    found = streamed(content, chunk)
    assert [element.value for element in found] == elements
    assert all(element.problem is None for element in found)
    for element in found:  # the offset is where the element begins
        value, end = json.JSONDecoder().raw_decode(content[element.offset :].decode())
        assert value == element.value
    for cut, whole in zip(streamed(content, chunk, longest), found, strict=True):
        text = content[whole.offset :].decode()
        _, end = json.JSONDecoder().raw_decode(text)
        assert cut.offset == whole.offset
        if end <= longest:
            assert cut == whole
        else:
            assert (cut.value, cut.problem) == (None, f"longer than {longest} characters")


@given(
    content=st.binary(max_size=60)
    | st.binary(max_size=60).map(lambda tail: b'[{"id": "a", ' + tail)
    | st.text('[]{}",:\\\\ue1-.tN', max_size=40).map(lambda tail: ("[" + tail).encode()),
    chunk=st.integers(1, 70),
    longest=st.integers(1, 70),
)
@settings(max_examples=1000, deadline=None)
def test_noise_is_a_data_error_or_a_list(content: bytes, chunk: int, longest: int):
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = streamed(content, chunk)
    except DataError as error:
        str(error).encode()  # a message that can be printed
        assert not isinstance(expected, list)
    else:
        assert repr([element.value for element in found]) == repr(expected)  # NaN is not itself
    try:
        cut = streamed(content, chunk, longest)
    except DataError:
        assert not isinstance(expected, list)
    else:  # what is read over may be no JSON
        assert expected is None or len(cut) == len(expected)


BASE = json.dumps(
    [record(0), record(1, "a.png"), record(2, conversations=[]), 5, record(4, x=[[{}, '\\"]'], -1.5e3])],
    indent=1,
).encode()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(BASE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        until = draw(st.integers(at, min(len(content), at + draw(st.sampled_from([0, 1, 3, 40])))))
        piece = draw(
            st.binary(max_size=4)
            | st.sampled_from([b"NaN", b'"', b"\\", b"[", b"]}", b',{"id":1},', b"[" * 120, b"\xef\xbb\xbf"])
        )
        content[at:until] = piece
    return bytes(content)


@given(content=mutated(), chunk=st.sampled_from([1, 7, 64, 1 << 20]), longest=st.sampled_from([60, 1 << 20]))
@settings(max_examples=500, deadline=None)
def test_a_damaged_file_gives_samples_and_findings_or_a_data_error(content: bytes, chunk: int, longest: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        patch.setattr(stream, "MAX_ELEMENT", longest)
        try:
            found = list(iter_records(Pieces(iter([content])), Path("x.json")))
        except DataError as error:
            str(error).encode()
            with pytest.raises(ValueError):  # noqa: PT011
                json.loads(content.decode("utf-8").removeprefix("\ufeff"))
            return
    assert [one.record for one in found] == list(range(len(found)))
    for one in found:
        if isinstance(one, Finding):
            str(one).encode()
            assert one.reason.endswith(".")
        else:
            assert isinstance(one, Parsed)
    try:
        expected = json.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except ValueError:
        return
    assert len(found) == len(expected)


@given(value=json_values, chunk=st.integers(1, 9), behind=st.sampled_from(["", "]", ", 1", " ", "}"]))
@settings(max_examples=300, deadline=None)
def test_skipping_finds_the_end_and_the_depth(value: Any, chunk: int, behind: str):
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        skipper, ends = Skipper(), []
        pieces = [(text + behind)[at : at + chunk] for at in range(0, len(text + behind), chunk)]
        for number, piece in enumerate(pieces):
            if (end := skipper.end(piece, 0)) is not None:
                ends.append(number * chunk + end)
                break
        scalar = not isinstance(value, dict | list | str)
        assert skipper.is_scalar == scalar
        assert ends == ([] if scalar and not behind else [len(text)])
        assert skipper.deepest == depth(value)


def test_depth_is_a_number_of_ours_and_no_matter_of_the_stack():
    for levels, ok in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False), (5000, False)):
        for open_, close in (("[", "]"), ('{"a":', "}"), ('[{"]":', "}]")):
            times = levels // len(close)
            content = f"[1, {open_ * times}{close[0] * 0}{'1' if ':' in open_ else ''}{close * times}, 2]"
            first, deep, last = streamed(content.encode())
            assert (first.value, last.value) == (1, 2)
            assert (deep.problem is None) == (ok or times * len(close) <= MAX_DEPTH)
    flat = json.dumps([[{}] * 500])
    assert streamed(flat.encode())[0].problem is None


def long_line(line: bytes, mebibytes: int) -> Iterator[bytes]:
    yield b'[{"id": "first"}, {"id": "long", "text": "'
    piece = line * ((1 << 20) // len(line))
    for _ in range(mebibytes):
        yield piece
    yield b'"}, {"id": "last"}]'


@pytest.mark.parametrize(("line", "mebibytes"), [(b"x" * 64, 1024), (rb"\\\"]}\n", 64)])
def test_a_line_of_a_gigabyte_is_read_over_in_little_memory(
    line: bytes, mebibytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "MAX_ELEMENT", 1 << 20)
    tracemalloc.start()
    first, long, last = stream_list(Pieces(long_line(line, mebibytes)), Path("x.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.value, last.value) == ({"id": "first"}, {"id": "last"})
    assert long.problem == "longer than 1,048,576 characters"
    assert last.offset - long.offset > (mebibytes - 1) << 20
    assert peak < 64 << 20


def test_a_long_scalar_and_one_the_file_ends_in():
    found = streamed(b"[1, " + b"7" * 5000 + b", 2]", 64, 1000)
    assert [element.problem for element in found] == [None, "longer than 1,000 characters", None]
    assert [element.value for element in found] == [1, None, 2]
    for tail in (b"7" * 5000, b'"' + b"x" * 5000, b"[" + b"1," * 5000, b'"' + b"\\" * 5001):
        with pytest.raises(
            DataError, match=r"the end of the file at byte|ends in the record that begins at byte 4"
        ):
            streamed(b"[1, " + tail, 64, 1000)


class Counted(Pieces):
    num_read = 0

    def read(self, size: int) -> bytes:
        taken = super().read(size)
        self.num_read += len(taken)
        return taken


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (b'{"id" 5}', "Expecting ':' delimiter at byte 44"),
        (b'{"id": 5}}', "expected a comma or the end of the list, found '}' at byte 47"),
        (b'{"id": 5}{', "expected a comma or the end of the list, found an object at byte 47"),
        (b"5x", "expected a comma or the end of the list, found 'x' at byte 39"),
        (b'{"id": 01}', "Expecting ',' delimiter at byte 46"),
        (b'{"id": "a\nb"}', "Invalid control character at byte 47"),
        (b"nul", "Expecting value at byte 38"),
        (b'["\\q"]', "Invalid .*escape.* at byte 40"),
        (b'{"id": "\xff"} \xff', "found byte 0xff, which is no UTF-8 at byte 50"),
    ],
)
def test_a_syntax_error_comes_early_and_names_the_byte(wrong: bytes, reason: str):
    start = '[{"id": "ü", "x": "'.encode() + b"y" * 14 + b'"}, '
    assert len(start) == 38
    file = Counted(iter([start, wrong, *[b', {"id": 7}' * 10_000] * 1000]))
    with pytest.raises(DataError, match=reason):
        list(stream_list(file, Path("x.json")))
    assert file.num_read <= 2 * stream.CHUNK
