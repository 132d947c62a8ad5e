"""Coverage-guided fuzzing of the record stream and parser; CONTRIBUTING.md says how to run it."""

import json
import sys
from io import BytesIO
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["morebench.data", "json"]):
    from morebench.data import stream
    from morebench.data.findings import Finding
    from morebench.data.records import iter_records
    from morebench.errors import DataError

LONGEST = 200


def one_input(data: bytes) -> None:
    if not data:
        return
    stream.CHUNK = 1 + data[0]
    stream.MAX_ELEMENT = LONGEST
    content = data[1:]
    try:
        expected = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        expected = None
    refused = None
    try:
        found = list(iter_records(BytesIO(content), Path("x.json")))
    except DataError as error:
        refused = str(error)
    if refused is not None:
        refused.encode()
        assert not isinstance(expected, list), refused
        return
    assert expected is None or len(found) == len(expected)
    for number, one in enumerate(found):
        assert one.record == number
        if isinstance(one, Finding):
            str(one).encode()
        else:
            json.dumps([one.sample.id, one.sample.images, str(one.sample.turns)], ensure_ascii=False).encode()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
