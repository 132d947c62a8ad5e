"""Records parsed once and then memory-mapped: 665k of them cost a process next to nothing, forked or not."""

import hashlib
import json
import stat
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from morebench.data.aside import replace_text
from morebench.data.findings import Finding, Kind
from morebench.data.once import once
from morebench.data.records import Sample, Turn
from morebench.data.store_build import SAMPLES, build, findings_path, unreadable
from morebench.errors import DataError

VERSION = 2  # raised when the same file would give another store


@dataclass(frozen=True, eq=False)
class RecordStore(Sequence[Sample]):
    """All usable samples of a records file, or the `rows` of them that are kept."""

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
        batch, row = self._place(number)
        record_id, images, questions, answers = (batch.column(column)[row].as_py() for column in range(4))
        return Sample(record_id, tuple(images), tuple(map(Turn, questions, answers)))

    def record_of(self, number: int) -> tuple[int, int]:
        """Of a sample: the number of its record in the file, and the byte at which that begins."""
        batch, row = self._place(number)
        return batch.column("record")[row].as_py(), batch.column("offset")[row].as_py()

    @property
    def records(self) -> np.ndarray:
        """int64 [N], ascending: of every sample, the number of its record in the file."""
        numbers = self._column("record").to_numpy()
        return numbers if self.rows is None else numbers[self.rows]

    def num_characters(self) -> np.ndarray:
        """int64 [N]: of all questions and answers of a sample."""
        counts = [
            _num_characters(batch.column("questions")) + _num_characters(batch.column("answers"))
            for batch in self._batches
        ]
        of_rows = np.concatenate([np.zeros(0, np.int64), *counts])
        return of_rows if self.rows is None else of_rows[self.rows]

    @property
    def num_records(self) -> int:
        """Of the file: usable or not."""
        return self._num_rows + self._findings.num_rows

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The records that are no usable sample."""
        return tuple(Finding(Kind[row.pop("kind")], **row) for row in self._findings.to_pylist())

    def duplicate_ids(self) -> np.ndarray:
        """int64, numbers of the samples whose id an earlier sample of this store has.

        An array and no findings: in published data it is a third of the samples.
        """
        ids = self._column("id") if self.rows is None else self._column("id").take(pa.array(self.rows))
        # every new id gets the next code, so that an id is new where its code is a new maximum
        codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
        before = np.maximum.accumulate(codes)
        return 1 + np.flatnonzero(codes[1:] <= before[:-1])

    def without(self, rows: Sequence[int]) -> "RecordStore":
        """`rows` are numbers of this store."""
        kept = np.arange(self._num_rows) if self.rows is None else self.rows
        return RecordStore(self.path, self.sha256, np.delete(kept, list(rows)))

    def image_names(self) -> list[str]:
        """Of all rows: each once, in the order of the records."""
        return self._column("images").combine_chunks().flatten().unique().to_pylist()

    def image_numbers(self, number: int) -> list[int]:
        """Of a sample's images: where they are in `image_names()`."""
        row = self._row(number)
        starts, numbers = self._image_numbers
        return numbers[starts[row] : starts[row + 1]].tolist()

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [N + 1] and int32 [M]: sample n shows images `second[first[n] : first[n + 1]]`.

        Numbers are places in `image_names()`.
        """
        starts, numbers = self._image_numbers
        if self.rows is None:
            return starts, numbers
        counts = np.diff(starts)[self.rows]
        kept = np.zeros(len(starts) - 1, np.bool_)
        kept[self.rows] = True
        of_kept = numbers[np.repeat(kept, np.diff(starts))]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), of_kept

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

    def _row(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        return number if self.rows is None else int(self.rows[number])

    def _place(self, number: int) -> tuple[pa.RecordBatch, int]:
        row = self._row(number)
        batch = bisect_right(self._starts, row) - 1
        return self._batches[batch], row - self._starts[batch]

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    @cached_property
    def _starts(self) -> list[int]:
        """First row of every batch, and the number of rows."""
        return list(accumulate((batch.num_rows for batch in self._batches), initial=0))

    @property
    def _num_rows(self) -> int:
        return self._starts[-1]

    @cached_property
    def _findings(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(findings_path(self.path)))).read_all()

    @cached_property
    def _image_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [rows + 1]: where the images of a row begin, and int32 [images] of all rows."""
        images = self._column("images").combine_chunks()
        return images.offsets.to_numpy(), images.flatten().dictionary_encode().indices.to_numpy()

    def _column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([batch.column(name) for batch in self._batches], SAMPLES.field(name).type)


def open_records(path: Path, cache: Path, say: Callable[[str], None] | None = None) -> RecordStore:
    """The store of a records file, made anew when the file's size or time has changed.

    A record that is no usable sample is one of the store's findings. Raises DataError for what is no list of
    records, and where not one of them can be used.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such records file; expected a JSON list of records there.") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise DataError(f"{path}: not a file; expected a JSON list of records.")
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    arrow = cache / "records" / f"{key}.arrow"
    wanted = {"version": VERSION, "size": found.st_size, "mtime_ns": found.st_mtime_ns}

    def load() -> RecordStore | None:
        facts = _facts(arrow)
        return RecordStore(arrow, facts["sha256"]) if wanted.items() <= facts.items() else None

    def make() -> RecordStore:
        if say is not None and found.st_size > 100e6:
            say(f"reading {path} ({found.st_size / 1e6:.0f} MB)")
        arrow.with_suffix(".json").unlink(missing_ok=True)  # it would vouch for what is replaced now
        sha256 = build(path, arrow)
        replace_text(arrow.with_suffix(".json"), json.dumps(wanted | {"sha256": sha256}))
        return RecordStore(arrow, sha256)

    return once(arrow, load, make)


def _num_characters(texts: pa.LargeListArray) -> np.ndarray:
    """int64, per list: of all its texts."""
    before = np.concatenate([[0], np.cumsum(pc.utf8_length(texts.flatten()).to_numpy())])
    bounds = texts.offsets.to_numpy() - texts.offsets[0].as_py()
    return before[bounds[1:]] - before[bounds[:-1]]


def _facts(arrow: Path) -> dict[str, Any]:
    """What the store was made of; nothing if it is not there or damaged."""
    try:
        facts = json.loads(arrow.with_suffix(".json").read_bytes())
        for one in (arrow, findings_path(arrow)):
            pa.ipc.open_file(pa.memory_map(str(one)))
    except (OSError, ValueError, pa.ArrowInvalid):
        return {}
    return facts if isinstance(facts, dict) else {}
