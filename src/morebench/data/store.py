"""Records parsed once and then memory-mapped: 665k of them cost a process next to nothing, forked or not."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from morebench.data.records import Sample, Turn, iter_records
from morebench.errors import DataError, join_problems

VERSION = 1
ROWS = 4096  # of a record batch: the unit that is read back
_TEXTS = pa.list_(pa.large_string())
_SCHEMA = pa.schema({"id": pa.string(), "images": _TEXTS, "questions": _TEXTS, "answers": _TEXTS})


@dataclass(frozen=True, eq=False)
class RecordStore(Sequence[Sample]):
    """All samples of a records file, or the `rows` of them that are kept."""

    path: Path  # Arrow IPC file
    sha256: str  # of the records file
    rows: np.ndarray | None = None  # int64 [N], ascending

    def __len__(self) -> int:
        return self._num_rows if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        batch, row = divmod(number if self.rows is None else int(self.rows[number]), ROWS)
        values = [column[row].as_py() for column in self._batches[batch].columns]
        turns = map(Turn, values[2], values[3])
        return Sample(values[0], tuple(values[1]), tuple(turns))

    def without(self, rows: Sequence[int]) -> "RecordStore":
        """`rows` are numbers of this store."""
        kept = np.arange(self._num_rows) if self.rows is None else self.rows
        return RecordStore(self.path, self.sha256, np.delete(kept, list(rows)))

    def image_names(self) -> list[str]:
        """Of all rows: each once, in the order of the records."""
        return self._column("images").combine_chunks().flatten().unique().to_pylist()

    def images(self) -> pa.ListArray:
        """The image paths of every sample that is kept."""
        images = self._column("images")
        return (images if self.rows is None else images.take(pa.array(self.rows))).combine_chunks()

    def rows_with_image(self, names: Sequence[str]) -> list[int]:
        """Numbers of the samples (of all rows) that show one of these images."""
        images = self._column("images").combine_chunks()
        hits = pc.is_in(images.flatten(), value_set=pa.array(names, pa.large_string()))
        return pc.list_parent_indices(images).filter(hits).unique().to_pylist()

    def ids(self) -> list[str]:
        ids = self._column("id")
        return (ids if self.rows is None else ids.take(pa.array(self.rows))).to_pylist()

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordStore, (self.path, self.sha256, self.rows)

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    @cached_property
    def _num_rows(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def _column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([batch.column(name) for batch in self._batches], _SCHEMA.field(name).type)


def open_records(path: Path, cache: Path, say: Callable[[str], None] | None = None) -> RecordStore:
    """The store of a records file, made anew when the file's size or time has changed.

    Raises one DataError that lists every bad record, with its place in the file.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such records file; expected a JSON list of records there.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    arrow = cache / "records" / f"{key}.arrow"
    wanted = {"version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    facts = _facts(arrow)
    if not wanted.items() <= facts.items():
        if say is not None and stat.st_size > 100e6:
            say(f"reading {path} ({stat.st_size / 1e6:.0f} MB)")
        facts = wanted | {"sha256": _build(path, arrow)}
        _replace(arrow.with_suffix(".json"), lambda aside: aside.write_text(json.dumps(facts)))
    return RecordStore(arrow, facts["sha256"])


def _facts(arrow: Path) -> dict[str, Any]:
    """What the store was made of; nothing if it is not there or damaged."""
    try:
        facts = json.loads(arrow.with_suffix(".json").read_bytes())
        pa.ipc.open_file(pa.memory_map(str(arrow)))
    except (OSError, ValueError, pa.ArrowInvalid):
        return {}
    return facts if isinstance(facts, dict) else {}


def _build(path: Path, arrow: Path) -> str:
    """Write the store of `path`; returns the file's sha256. Nothing is left behind for a bad file."""
    problems: list[str] = []
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:

            def write(aside: Path) -> None:
                samples = _good(iter_records(_Hashed(file, digest), path), problems)
                num_rows = _write_batches(samples, aside)
                if not num_rows and not problems:
                    raise DataError(f"{path}: the list of records is empty; expected at least one.")
                if problems:
                    raise _bad_records(problems, num_rows + len(problems), path)

            _replace(arrow, write)
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()


class _Hashed:
    """A file whose content goes through a digest on its way."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._digest.update(content)
        return content


def _good(found: Iterator[Sample | DataError], problems: list[str]) -> Iterator[Sample]:
    for one in found:
        if isinstance(one, Sample):
            yield one
        else:
            problems.append(str(one))


def _write_batches(samples: Iterator[Sample], path: Path) -> int:
    num_rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        rows: list[Sample] = []
        for sample in samples:
            rows.append(sample)
            if len(rows) == ROWS:
                writer.write_batch(_batch(rows))
                num_rows += len(rows)
                rows.clear()
        if rows:
            writer.write_batch(_batch(rows))
    return num_rows + len(rows)


def _batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    columns = {
        "id": [sample.id for sample in samples],
        "images": [list(sample.images) for sample in samples],
        "questions": [[turn.question for turn in sample.turns] for sample in samples],
        "answers": [[turn.answer for turn in sample.turns] for sample in samples],
    }
    return pa.record_batch(columns, schema=_SCHEMA)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _bad_records(problems: Sequence[str], num_records: int, path: Path) -> DataError:
    if len(problems) == 1:
        return DataError(problems[0])
    head = f"{len(problems)} of {num_records} records in {path} cannot be used:"
    return DataError(f"{head}\n{join_problems(problems)}")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: the records file cannot be read: {error.strerror or error}.")
