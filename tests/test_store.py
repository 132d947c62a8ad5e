"""Records in a memory-mapped store: what the parser gave, and where it was found."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from factories_data import record

from morebench.data import store, store_build
from morebench.data.findings import Kind
from morebench.data.records import Sample, Turn, parse_record
from morebench.data.store import RecordStore, open_records
from morebench.errors import DataError


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def asks(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def says(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def opened_again(tmp_path: Path) -> RecordStore:
    return open_records(tmp_path / "records.json", tmp_path / "cache")


def opened(tmp_path: Path, records: Any) -> RecordStore:
    return open_records(write(tmp_path / "records.json", records), tmp_path / "cache")


def test_samples_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "ROWS", 4)
    raw = [record(n, f"{n % 3}.png" if n % 2 else None) for n in range(11)]
    raw[5]["conversations"] = [
        {"from": "human", "value": "<image> ü 数 \u0000"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "and?"},
        {"from": "gpt", "value": "😀"},
    ]
    expected = [parse_record(one) for one in raw]
    found = opened(tmp_path, raw)
    assert list(found) == expected
    assert found[3:7] == expected[3:7]
    assert found[-1] == expected[-1]
    assert found.ids() == [sample.id for sample in expected]
    assert found.image_names() == ["1.png", "0.png", "2.png"]
    assert found.rows_with_image(["2.png", "nix.png"]) == [5]
    assert isinstance(found[5], Sample)
    assert found[5].turns[0] == Turn("<image> ü 数 \u0000", "yes")
    with pytest.raises(IndexError):
        found[11]
    left = found.without([0, 9])
    assert list(left) == [one for n, one in enumerate(expected) if n not in (0, 9)]
    assert left.ids() == [one.id for one in left]
    assert list(pickle.loads(pickle.dumps(left))) == list(left)  # as a spawned data worker gets it


def test_a_store_is_made_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = opened(tmp_path, [record(0), record(1)])
    with monkeypatch.context() as patch:
        patch.setattr(store, "build", None)  # would fail if called
        again = open_records(tmp_path / "records.json", tmp_path / "cache")
    assert (list(again), again.sha256) == (list(first), first.sha256)
    changed = opened(tmp_path, [record(0), record(2)])
    assert [sample.id for sample in changed] == ["r0", "r2"]
    assert changed.sha256 != first.sha256


def test_a_damaged_store_is_made_again(tmp_path: Path):
    first = opened(tmp_path, [record(0)])
    content = first.path.read_bytes()
    first.path.write_bytes(content[: len(content) // 2])
    assert list(open_records(tmp_path / "records.json", tmp_path / "cache")) == [parse_record(record(0))]


def test_bad_records_stand_beside_the_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "ROWS", 2)
    raw = [record(n, conversations=[] if n % 3 == 1 else None) if n % 3 else record(n) for n in range(11)]
    raw[6] = 6
    first = opened(tmp_path, raw)
    with monkeypatch.context() as patch:
        patch.setattr(store, "build", None)
        again = opened_again(tmp_path)
    for found in (first, again, pickle.loads(pickle.dumps(first)), first.without([1])):
        assert found.num_records == 11
        assert [(one.record, one.id) for one in found.findings] == [
            (1, "r1"),
            (2, "r2"),
            (4, "r4"),
            (5, "r5"),
            (6, None),
            (7, "r7"),
            (8, "r8"),
            (10, "r10"),
        ]
        assert {one.kind for one in found.findings} == {Kind.malformed}
    assert [sample.id for sample in first] == ["r0", "r3", "r9"]
    content = (tmp_path / "records.json").read_bytes()
    places = {first.record_of(n): first[n].id for n in range(3)}
    places |= {(one.record, one.offset): one.id for one in first.findings}
    assert len(places) == 11
    for (number, offset), record_id in places.items():
        value, _ = json.JSONDecoder().raw_decode(content[offset:].decode())
        assert value == raw[number]
        assert record_id == (None if number == 6 else value["id"])
    left = first.without([0])
    assert [left.record_of(n)[0] for n in range(2)] == [3, 9]


def test_a_store_whose_findings_are_gone_is_made_again(tmp_path: Path):
    first = opened(tmp_path, [record(0), 1])
    store_build.findings_path(first.path).unlink()
    assert opened_again(tmp_path).findings == first.findings


def test_ids_that_occur_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "ROWS", 2)
    ids = ["a", "b", "a", "c", "c", "a", "d"]
    found = opened(tmp_path, [record(0, id="d", conversations=[])] + [record(0, id=one) for one in ids])
    assert found.duplicate_ids().tolist() == [2, 4, 5]  # the first "d" cannot be used
    assert opened(tmp_path, [record(0)]).duplicate_ids().tolist() == []


def test_image_numbers_are_places_in_the_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "ROWS", 3)
    images = [["b", "a"], [], ["a"], ["c", "c"], [], ["b"], ["d", "a", "d"]]
    raw = [
        record(n, image=some, conversations=[asks("<image>" * len(some)), says("x")])
        for n, some in enumerate(images)
    ]
    found = opened(tmp_path, raw)
    names = found.image_names()
    for kept in (found, found.without([0, 2]), pickle.loads(pickle.dumps(found.without([6])))):
        for number, sample in enumerate(kept):
            assert [names[one] for one in kept.image_numbers(number)] == list(sample.images)
    with pytest.raises(IndexError):
        found.image_numbers(7)
    assert opened(tmp_path, [record(0)]).image_numbers(0) == []


def test_batches_are_bounded_by_their_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "MAX_BATCH_BYTES", 1000)
    raw = [record(n, id="x" * (300 * n)) for n in range(1, 8)]
    found = opened(tmp_path, raw)
    assert [len(sample.id) for sample in found] == [300 * n for n in range(1, 8)]
    assert [found.record_of(n)[0] for n in range(-7, 0)] == list(range(7))
    assert max(batch.num_rows for batch in found._batches) < 4


def test_a_file_that_cannot_be_used_leaves_no_store(tmp_path: Path):
    for records in ([], [1], {"a": 1}):
        with pytest.raises(DataError):
            opened(tmp_path, records)
        assert list((tmp_path / "cache" / "records").iterdir()) == []


def test_a_folder_or_a_pipe_is_no_records_file(tmp_path: Path):
    os.mkfifo(tmp_path / "records.json")
    (tmp_path / "folder").mkdir()
    for name in ("records.json", "folder"):
        with pytest.raises(DataError, match="not a file; expected a JSON list"):
            open_records(tmp_path / name, tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"id": "a", "id": "b", "id": 1}', "the same key twice: id."),
        (b'{"id": NaN}', "NaN is no value that JSON knows."),
        (b'{"id": "a", "x": -Infinity}', "-Infinity is no value that JSON knows."),
        (b'{"id": "a", "x": 1' + b"0" * 5000 + b"}", "a number of 5001 digits."),
        (b'{"id": "\xe4"}', "byte 0xe4 at byte 9 is no UTF-8."),
        (b'{"\xed\xa0\x80": "a"}', "byte 0xed at byte 3 is no UTF-8."),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels."),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 100 levels."),
        (b'{"a":' * 100_000 + b'"]"' + b"}" * 100_000, "nested deeper than 100 levels."),
    ],
)
def test_what_python_would_let_pass_is_found_with_its_place(tmp_path: Path, content: bytes, reason: str):
    good = json.dumps(record(7)).encode()
    (tmp_path / "records.json").write_bytes(b"[" + content + b", " + good + b"]")
    found = opened_again(tmp_path)
    assert list(found) == [parse_record(record(7))]
    (finding,) = found.findings
    assert (finding.kind, finding.reason, finding.record, finding.offset) == (Kind.malformed, reason, 0, 1)
    assert found.record_of(0) == (1, len(content) + 3)
