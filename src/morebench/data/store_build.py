"""Writes the store of a records file: one Arrow file of samples, one of what is wrong with the others."""

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from morebench.data.aside import replace_file
from morebench.data.findings import Finding
from morebench.data.records import Parsed, iter_records
from morebench.errors import DataError, join_problems

_TEXTS = pa.list_(pa.large_string())
SAMPLES = pa.schema(
    {
        "id": pa.large_string(),
        "images": _TEXTS,
        "questions": _TEXTS,
        "answers": _TEXTS,
        "record": pa.int64(),  # number in the records file, from 0
        "offset": pa.int64(),  # byte in the records file
    }
)
FINDINGS = pa.schema(
    {
        "kind": pa.string(),
        "reason": pa.large_string(),
        "record": pa.int64(),
        "offset": pa.int64(),
        "id": pa.large_string(),
    }
)
ROWS = 4096  # of a record batch: the unit that is written, and read back
MAX_BATCH_BYTES = 64 << 20  # of the records in it, about


def findings_path(arrow: Path) -> Path:
    return arrow.with_suffix(".findings.arrow")


def build(path: Path, arrow: Path) -> str:
    """Write the store of `path`; returns the file's sha256. Nothing is left behind for a bad file."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with file:
        hashed = _Hashed(file, path)
        found = iter_records(hashed, path)
        replace_file(
            arrow,
            lambda aside: replace_file(
                findings_path(arrow), lambda aside_bad: _write(found, aside, aside_bad, path)
            ),
        )
    return hashed.digest.hexdigest()


class _Hashed:
    """A file whose content goes through a digest on its way."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        try:
            content = self._file.read(size)
        except OSError as error:
            raise unreadable(self._path, error) from None
        self.digest.update(content)
        return content


def _write(found: Iterable[Parsed | Finding], samples_path: Path, bad_path: Path, path: Path) -> None:
    first_bad: list[str] = []
    with ExitStack() as stack:
        samples = stack.enter_context(_Table(samples_path, SAMPLES))
        bad = stack.enter_context(_Table(bad_path, FINDINGS))
        for one in found:
            if isinstance(one, Parsed):
                samples.add(*_sample_row(one))
            else:
                if len(first_bad) < 20:
                    first_bad.append(f"{path}: {one}")
                row = (one.kind.name, one.reason, one.record, one.offset, one.id)
                bad.add(row, len(one.reason))
    if samples.num_rows == 0:
        if bad.num_rows == 0:
            raise DataError(f"{path}: the list of records is empty; expected at least one.")
        head = f"{path}: none of the {bad.num_rows} records can be used:"
        raise DataError(f"{head}\n{join_problems(first_bad)}")


def _sample_row(parsed: Parsed) -> tuple[tuple[Any, ...], int]:
    """The values of the columns, and about how much they take."""
    sample = parsed.sample
    questions = [turn.question for turn in sample.turns]
    answers = [turn.answer for turn in sample.turns]
    row = (sample.id, sample.images, questions, answers, parsed.record, parsed.offset)
    texts = (sample.id, *sample.images, *questions, *answers)
    return row, sum(map(len, texts))


class _Table:
    """An Arrow IPC file, written batch by batch."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._rows: list[tuple[Any, ...]] = []
        self._num_characters = 0
        self.num_rows = 0

    def __enter__(self) -> "_Table":
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def __exit__(self, *error: object) -> None:
        with self._sink, self._writer:
            if error[0] is None:
                self._flush()

    def add(self, row: tuple[Any, ...], num_characters: int) -> None:
        self._rows.append(row)
        self.num_rows += 1
        self._num_characters += num_characters
        if len(self._rows) == ROWS or self._num_characters > MAX_BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows.clear()
        self._num_characters = 0


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: the records file cannot be read: {error.strerror or error}.")
