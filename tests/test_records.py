import json
from pathlib import Path
from typing import Any

import pytest
from factories_data import record

from morebench.data.records import Turn, parse_record
from morebench.data.store import RecordStore, open_records
from morebench.errors import EXIT_USER, DataError


def read_records(path: Path) -> RecordStore:
    return open_records(path, path.parent / "cache")


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def test_a_record_becomes_turns():
    sample = parse_record(
        {
            "id": 7,
            "image": ["a.png", "b/c.png"],
            "model": "",
            "conversations": [human("<image> or <image>?"), gpt("one"), human("why?"), gpt("")],
        },
        "x.json: record 0",
    )
    assert sample.id == "7"
    assert sample.images == ("a.png", "b/c.png")
    assert sample.turns == (Turn("<image> or <image>?", "one"), Turn("why?", ""))


def test_text_only_records_need_no_image_key():
    assert parse_record(record(0), "").images == ()
    assert parse_record(record(0) | {"image": None}, "").images == ()


def test_a_leading_answer_is_dropped():
    sample = parse_record(record(0, conversations=[gpt("hi"), human("q"), gpt("a")]), "")
    assert sample.turns == (Turn("q", "a"),)


def test_an_image_token_in_an_answer_is_text():
    assert parse_record(record(0, conversations=[human("q"), gpt("write <image>")]), "").images == ()


BAD_RECORDS = {
    "no conversations": (record(3, conversations=None), "no `conversations`; its keys are id"),
    "empty conversations": (record(3, conversations=[]), "expected `conversations` to be a list"),
    "conversations as text": (record(3, conversations="hi"), "expected `conversations` to be a list"),
    "message without value": (record(3, conversations=[{"from": "human"}, gpt("a")]), "message 0"),
    "two questions": (record(3, conversations=[human("q"), human("q")]), "found human, human"),
    "other role": (record(3, conversations=[human("q"), {"from": "bot", "value": "a"}]), "human, bot"),
    "no answer": (record(3, conversations=[human("q"), gpt("a"), human("q")]), "end with gpt"),
    "only a leading answer": (record(3, conversations=[gpt("a")]), "no message after the leading gpt"),
    "image without image token": (record(3, "a.png", conversations=[human("q"), gpt("a")]), "0 <image>"),
    "image token without image": (record(3, conversations=[human("<image>q"), gpt("a")]), "0 image(s)"),
    "image token in the answer": (
        record(3, "a.png", conversations=[human("q"), gpt("<image>")]),
        "0 <image>",
    ),
    "two image tokens": (record(3, "a.png", conversations=[human("<image><image>"), gpt("")]), "2 <image>"),
    "empty image": (record(3, conversations=[human("q"), gpt("a")], image=""), "found ''"),
    "image as number": (record(3, conversations=[human("q"), gpt("a")], image=5), "found 5"),
    "half a character": (record(3, conversations=[human("\ud83d"), gpt("a")]), "half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_name_file_index_and_id(tmp_path: Path, name: str):
    bad, reason = BAD_RECORDS[name]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(0), record(1), bad]))
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert f"{path}: record 2 (id 'r3')" in message
    assert reason in message
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_USER


@pytest.mark.parametrize("raw", [[], "text", None, {"conversations": []}, record(0) | {"id": ""}])
def test_records_that_are_no_objects_or_have_no_id(raw: object):
    with pytest.raises(DataError, match=r"x\.json: record 4: expected"):
        parse_record(raw, "x.json: record 4")


def test_all_bad_records_are_reported_at_once(tmp_path: Path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(i, conversations=[]) if i % 2 else record(i) for i in range(100)]))
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert "50 of 100 records" in message
    assert "record 1 (id 'r1')" in message
    assert "record 3 (id 'r3')" in message
    assert "30 more of this kind" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "list of records is empty"),
        ("", "expected a JSON list of records, found the end of the file"),
        ('[{"id": 1', "not valid JSON"),
        ('{"id": 1}', "found an object"),
        ('[{"id": 1} {', "a comma or the end of the list, found an object at byte 11"),
        ("[1] x", "something follows the end of the list: 'x' at byte 4"),
        ("[1,]", "Expecting value at byte 3"),
        (f"[{'[' * 100_000}", "nested too deeply at byte 1"),
        (b"\xff\xfe[", "UTF-8"),
    ],
)
def test_a_file_that_is_no_list_of_records(tmp_path: Path, content: Any, reason: str):
    path = tmp_path / "records.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(DataError, match="no such records file"):
        read_records(tmp_path / "records.json")
