"""Records in a memory-mapped store: what a plain parser gives, for any file and any size of chunk."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from factories_data import record
from hypothesis import given, settings
from hypothesis import strategies as st

from morebench.data import store, stream
from morebench.data.records import Sample, Turn, parse_record
from morebench.data.store import RecordStore, open_records
from morebench.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def opened(tmp_path: Path, records: Any) -> RecordStore:
    return open_records(write(tmp_path / "records.json", records), tmp_path / "cache")


@given(
    elements=st.lists(json_values, max_size=6),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    bom=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_stream_gives_what_json_gives(
    elements: list[Any], chunk: int, ascii_only: bool, indent: int | None, bom: bool
):
    content = json.dumps(elements, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8-sig" if bom else "utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        found = list(stream.stream_list(_Bytes(content), Path("x.json")))
    assert [element.value for element in found] == elements
    assert all(element.problem is None for element in found)
    for element in found:  # the offset is where the element begins
        value, _ = json.JSONDecoder().raw_decode(content[element.offset :].decode())
        assert value == element.value


class _Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, size: int) -> bytes:
        taken, self.content = self.content[:size], self.content[size:]
        return taken


@given(content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b'[{"id": "a", ' + tail))
@settings(max_examples=300, deadline=None)
def test_noise_is_a_data_error_or_a_list(content: bytes):
    try:
        found = [element.value for element in stream.stream_list(_Bytes(content), Path("x.json"))]
    except DataError as error:
        str(error).encode()  # a message that can be printed
    else:
        assert found == json.loads(content.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))


def test_samples_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "ROWS", 4)
    raw = [record(n, f"{n % 3}.png" if n % 2 else None) for n in range(11)]
    raw[5]["conversations"] = [
        {"from": "human", "value": "<image> ü 数 \u0000"},
        {"from": "gpt", "value": ""},
        {"from": "human", "value": "and?"},
        {"from": "gpt", "value": "😀"},
    ]
    expected = [parse_record(one, "") for one in raw]
    found = opened(tmp_path, raw)
    assert list(found) == expected
    assert found[3:7] == expected[3:7]
    assert found[-1] == expected[-1]
    assert found.ids() == [sample.id for sample in expected]
    assert found.image_names() == ["1.png", "0.png", "2.png"]
    assert found.rows_with_image(["2.png", "nix.png"]) == [5]
    assert isinstance(found[5], Sample)
    assert found[5].turns[0] == Turn("<image> ü 数 \u0000", "")
    with pytest.raises(IndexError):
        found[11]
    left = found.without([0, 9])
    assert list(left) == [one for n, one in enumerate(expected) if n not in (0, 9)]
    assert left.ids() == [one.id for one in left]
    assert list(pickle.loads(pickle.dumps(left))) == list(left)  # as a spawned data worker gets it


def test_a_store_is_made_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = opened(tmp_path, [record(0), record(1)])
    with monkeypatch.context() as patch:
        patch.setattr(store, "_build", None)  # would fail if called
        again = open_records(tmp_path / "records.json", tmp_path / "cache")
    assert (list(again), again.sha256) == (list(first), first.sha256)
    changed = opened(tmp_path, [record(0), record(2)])
    assert [sample.id for sample in changed] == ["r0", "r2"]
    assert changed.sha256 != first.sha256


def test_a_damaged_store_is_made_again(tmp_path: Path):
    first = opened(tmp_path, [record(0)])
    content = first.path.read_bytes()
    first.path.write_bytes(content[: len(content) // 2])
    assert list(open_records(tmp_path / "records.json", tmp_path / "cache")) == [parse_record(record(0), "")]


def test_a_bad_file_leaves_no_store(tmp_path: Path):
    with pytest.raises(DataError):
        opened(tmp_path, [record(0), record(1, conversations=[])])
    assert list((tmp_path / "cache" / "records").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": "a", "id": "b"}]', "record 0: the same key twice: id. (byte 1)"),
        (b'[1, {"id": NaN}]', "record 1: NaN is no value that JSON knows. (byte 4)"),
        (b'[{"id": "a", "x": -Infinity}]', "-Infinity is no value"),
        (
            b'[{"id": "a", "conversations": [{"from": "human", "value": "q\xe4"},'
            b' {"from": "gpt", "value": ""}]}]',
            "a byte that is no UTF-8 at character 1. (byte 1)",
        ),
    ],
)
def test_what_python_would_let_pass_is_found_with_its_place(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_records(tmp_path / "x.json", tmp_path / "cache")
    assert reason in str(caught.value)


def test_one_record_of_any_size_is_no_list_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "CHUNK", 64)
    monkeypatch.setattr(stream, "MAX_ELEMENT", 1000)
    path = tmp_path / "x.json"
    path.write_text('[{"id": "' + "x" * 100_000)
    with pytest.raises(DataError, match=r"does not end within 1,000 characters at byte 1"):
        open_records(path, tmp_path / "cache")
    path.write_text(json.dumps([record(0, id="x" * 500), record(1)]))
    assert len(open_records(path, tmp_path / "cache")) == 2
