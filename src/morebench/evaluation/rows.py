"""Rows of parquet files, or of a data set that `datasets` saved: text at once, images a few rows a time."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from morebench.errors import DataError, join_problems
from morebench.evaluation.layout import PARQUET

ROWS_PER_READ = 16  # of images: a row may hold the frames of a video
_BUFFER_BYTES = 2**20  # of a column that is read bit by bit instead of a whole row group at once
_IMAGE_PARTS = {"bytes", "path"}


@dataclass(frozen=True)
class StoredBytes:
    """An image as a row holds it."""

    content: bytes | None
    path: str | None


class Table(Protocol):
    schema: pa.Schema
    num_rows: int

    def batches(self, leaves: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        """`leaves`: columns, or parts of image columns as `without_bytes` names them."""

    def without_bytes(self, column: str) -> Sequence[str]: ...


class Rows:
    """Raises DataError for what is no table. No image is read before it is asked for."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.where = f"{folder / names[0]}{f' (of {len(names)})' if len(names) > 1 else ''}"
        is_parquet = names[0].endswith(PARQUET)
        self._table: Table = _Parquet(folder, names) if is_parquet else _Saved((folder / names[0]).parent)
        self.num_rows = self._table.num_rows

    @cached_property
    def columns(self) -> Sequence[str]:
        return self._table.schema.names

    @cached_property
    def image_columns(self) -> AbstractSet[str]:
        return {field.name for field in self._table.schema if _is_image(_element(field.type))}

    def told_columns(self) -> str:
        return told(self._table.schema)

    def records(self) -> list[dict[str, Any]]:
        """An image is the name of its place, `image` or `image[2]`, or None where a row has none."""
        text = [column for column in self.columns if column not in self.image_columns]
        leaves = [
            *text,
            *(leaf for column in self.image_columns for leaf in self._table.without_bytes(column)),
        ]
        found: list[dict[str, Any]] = []
        for batch in self._read(leaves, 1000):
            records = batch.select(text).to_pylist()
            for column in self.image_columns:
                for record, place in zip(records, _places(column, batch.column(column)), strict=True):
                    record[column] = place
            found += records
        return found

    def images(self, wanted: Mapping[str, AbstractSet[int]]) -> Iterator[tuple[int, str, StoredBytes]]:
        """(row, place, image) of the wanted places (`image`, `image[2]`), row after row."""
        by_column: dict[str, dict[int, list[tuple[str, int | None]]]] = {}
        for place, rows in wanted.items():
            column, _, rest = place.partition("[")
            for row in rows:
                inner = int(rest[:-1]) if rest else None
                by_column.setdefault(column, {}).setdefault(row, []).append((place, inner))
        first = 0
        for batch in self._read(list(by_column), ROWS_PER_READ):
            for column, rows_of in by_column.items():
                values = batch.column(column)
                for row in range(first, first + len(batch)):
                    if places := rows_of.get(row):
                        cell = values[row - first].as_py()
                        for place, inner in places:
                            image = cell[inner or 0] if isinstance(cell, list) else cell
                            yield row, place, StoredBytes(image["bytes"], image["path"])
            first += len(batch)

    def _read(self, leaves: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._table.batches(leaves, size)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self.where} cannot be read to its end: {_first_line(error)}") from error


class _Parquet:
    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._files: list[pq.ParquetFile] = []
        problems = []
        for name in names:
            try:
                self._files.append(pq.ParquetFile(folder / name, buffer_size=_BUFFER_BYTES))
            except (OSError, pa.ArrowException) as error:
                problems.append(
                    f"{folder / name} is no complete parquet file ({_first_line(error)}). Fetch it again."
                )
        if problems:
            raise DataError(join_problems(problems))
        self.schema: pa.Schema = self._files[0].schema_arrow
        for name, file in zip(names, self._files, strict=True):
            if not file.schema_arrow.equals(self.schema):
                problems.append(
                    f"{folder / name} has the columns {told(file.schema_arrow)}, but {names[0]} has "
                    f"{told(self.schema)}. Are they of one version of the data set?"
                )
        if problems:
            raise DataError(join_problems(problems))
        self.num_rows = sum(file.metadata.num_rows for file in self._files)

    def without_bytes(self, column: str) -> Sequence[str]:
        schema = self._files[0].schema
        leaves = [schema.column(number).path for number in range(len(schema))]
        return [leaf for leaf in leaves if leaf.startswith(f"{column}.") and not leaf.endswith(".bytes")]

    def batches(self, leaves: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            yield from file.iter_batches(size, columns=list(leaves), use_threads=False)


class _Saved:
    def __init__(self, folder: Path) -> None:
        from datasets import load_from_disk

        try:
            self._table: pa.Table = load_from_disk(str(folder), keep_in_memory=False).data.table
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no complete saved data set: {_first_line(error)}") from error
        self.schema: pa.Schema = self._table.schema
        self.num_rows: int = self._table.num_rows

    def without_bytes(self, column: str) -> Sequence[str]:
        return [column]  # memory-mapped: bytes that nobody looks at are not read

    def batches(self, leaves: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        yield from self._table.select(list(leaves)).to_batches(size)


def _element(kind: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list else kind


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind} == _IMAGE_PARTS


def _places(column: str, images: pa.Array) -> list[Any]:
    if pa.types.is_struct(images.type):
        return [column if is_there else None for is_there in images.is_valid().to_pylist()]
    inner = iter(images.flatten().is_valid().to_pylist())
    return [
        None if length is None else [f"{column}[{n}]" if next(inner) else None for n in range(length)]
        for length in pc.list_value_length(images).to_pylist()
    ]


def told(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().splitlines()[0][:200]}" if str(error).strip() else type(error).__name__
