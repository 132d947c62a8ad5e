import json
from pathlib import Path
from typing import Any

import pytest
from factories_data import record

from morebench.data.findings import Kind
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
            "conversations": [human("<image> or <image>?"), gpt("one"), human("why?"), gpt("so")],
        }
    )
    assert sample.id == "7"
    assert sample.images == ("a.png", "b/c.png")
    assert sample.turns == (Turn("<image> or <image>?", "one"), Turn("why?", "so"))


def test_text_only_records_need_no_image_key():
    assert parse_record(record(0)).images == ()
    assert parse_record(record(0) | {"image": None}).images == ()


def test_a_leading_answer_is_dropped():
    sample = parse_record(record(0, conversations=[gpt("hi"), human("q"), gpt("a")]))
    assert sample.turns == (Turn("q", "a"),)


def test_an_image_token_in_an_answer_is_text():
    assert parse_record(record(0, conversations=[human("q"), gpt("write <image>")])).images == ()


BAD_RECORDS = {
    "no conversations": (
        record(3, conversations=None),
        Kind.malformed,
        "no `conversations`; its keys are id",
    ),
    "empty conversations": (record(3, conversations=[]), Kind.malformed, "`conversations` to be a list"),
    "conversations as text": (record(3, conversations="hi"), Kind.malformed, "`conversations` to be a list"),
    "message without value": (
        record(3, conversations=[{"from": "human"}, gpt("a")]),
        Kind.malformed,
        "message 0",
    ),
    "two questions": (record(3, conversations=[human("q"), human("q")]), Kind.turns, "found human, human"),
    "other role": (
        record(3, conversations=[human("q"), {"from": "bot", "value": "a"}]),
        Kind.turns,
        "human, bot",
    ),
    "half a character as role": (
        record(3, conversations=[human("q"), {"from": "\ud83d", "value": "a"}]),
        Kind.turns,
        "human, \\ud83d",
    ),
    "no answer": (record(3, conversations=[human("q"), gpt("a"), human("q")]), Kind.turns, "end with gpt"),
    "only a leading answer": (
        record(3, conversations=[gpt("a")]),
        Kind.turns,
        "no message after the leading gpt",
    ),
    "empty answer": (record(3, conversations=[human("q"), gpt("")]), Kind.empty_answer, "answer 0 is ''"),
    "blank answer": (
        record(3, conversations=[human("q"), gpt("a"), human("q"), gpt(" \n\u3000")]),
        Kind.empty_answer,
        "answer 1 is ' \\n\\u3000'",
    ),
    "image without image token": (
        record(3, "a.png", conversations=[human("q"), gpt("a")]),
        Kind.image_count,
        "0 <image>",
    ),
    "image token without image": (
        record(3, conversations=[human("<image>q"), gpt("a")]),
        Kind.image_count,
        "0 image(s)",
    ),
    "image token in the answer": (
        record(3, "a.png", conversations=[human("q"), gpt("<image>")]),
        Kind.image_count,
        "0 <image>",
    ),
    "two image tokens": (
        record(3, "a.png", conversations=[human("<image><image>"), gpt("a")]),
        Kind.image_count,
        "2 <image>",
    ),
    "empty image": (record(3, image=""), Kind.malformed, "found ''"),
    "image as number": (record(3, image=5), Kind.malformed, "found 5"),
    "half a character": (
        record(3, conversations=[human("\ud83d"), gpt("a")]),
        Kind.malformed,
        "half a surrogate pair",
    ),
    "half a character as image": (record(3, image="\udc00.png"), Kind.malformed, "`image`: half a surr"),
    "an endless key": (
        record(3, conversations=None) | {"k" * 10_000: 1},
        Kind.malformed,
        "k" * 100,
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_a_finding_with_kind_place_and_id(tmp_path: Path, name: str):
    bad, kind, reason = BAD_RECORDS[name]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(0), record(1), bad, record(4)]))
    found = read_records(path)
    assert [sample.id for sample in found] == ["r0", "r1", "r4"]
    (finding,) = found.findings
    assert (finding.kind, finding.record, finding.id) == (kind, 2, "r3")
    assert kind.quarantines
    assert reason in finding.reason
    assert len(finding.reason) < 400
    assert json.JSONDecoder().raw_decode(path.read_text()[finding.offset :])[0] == bad
    assert str(finding).startswith("record 2 (id 'r3'): ")
    assert str(finding).endswith(f" (byte {finding.offset})")
    str(finding).encode()


NO_ID = [[], "text", None, {"conversations": []}, record(0) | {"id": ""}, record(0) | {"id": True}]


@pytest.mark.parametrize("raw", NO_ID)
def test_records_that_are_no_objects_or_have_no_id(tmp_path: Path, raw: object):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([raw, record(1)]))
    (finding,) = read_records(path).findings
    assert (finding.kind, finding.record, finding.id) == (Kind.malformed, 0, None)
    assert "expected an " in finding.reason


def test_an_id_that_is_no_text(tmp_path: Path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(0, id="a\ud83d"), record(1)]))
    (finding,) = read_records(path).findings
    assert (finding.kind, finding.id) == (Kind.malformed, "a\\ud83d")


def test_no_usable_record_is_an_error_that_names_them(tmp_path: Path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(i, conversations=[]) for i in range(100)]))
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: none of the 100 records can be used:")
    assert f"{path}: record 1 (id 'r1'): expected" in message
    assert message.count("\n") == 20
    assert caught.value.exit_code == EXIT_USER


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
        (f"[{'[' * 100_000}", "the file ends in the record that begins at byte 1"),
        ('[{"id": 1, "a" 2}]', "Expecting ':' delimiter at byte 15, in the record that begins at byte 1"),
        ('["ü", tru]', "Expecting value at byte 7"),
        ('["\\x"]', "Invalid .escape.* at byte 2, in the record"),
        ('["', "Unterminated string starting at byte 1"),
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
