"""Candidates of a parquet shard of metadata, as LAION, Recap-DataComp-1B and img2dataset write them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from morebench.data.subset.candidates import CandidateWriter, as_id
from morebench.data.subset.drops import Drop
from morebench.data.subset.shards import Columns

ROWS_PER_READ = 10_000
KEY = "key"
SHARD_DIGITS = 5  # img2dataset: 00453/004539375.jpg is row 9375 of shard 453
MARKS = ("status", "error_message")  # img2dataset writes both: a `status` alone may mean anything
Used = dict[str, str]  # what for -> column


def column_problem(path: Path, columns: Columns) -> str | None:
    """What a user must mend; None for a damaged shard, which is counted when it is read."""
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return None
    problems = []
    for purpose, wanted in (("id", columns.id or (KEY,)), ("caption", columns.caption)):
        if not set(wanted) & set(names):
            problems.append(f"no column {' or '.join(wanted)} (columns.{purpose})")
    if columns.image is None and KEY not in names:
        problems.append(f"no column {KEY} to find images by; name the one of their paths (columns.image)")
    elif columns.image is not None and columns.image not in names:
        problems.append(f"no column {columns.image} (columns.image)")
    return f"{path}: {'; '.join(problems)}. It has {', '.join(names)}." if problems else None


def scan_parquet(path: Path, columns: Columns, writer: CandidateWriter) -> tuple[int, Used, str | None]:
    """Rows read, columns used, and what is wrong with the file from some row on."""
    num_rows, used = 0, {}
    try:
        with pq.ParquetFile(path) as shard:
            used = _used(shard.schema_arrow.names, columns)
            for row in _rows(shard, used):
                num_rows += 1
                _add(row, used, writer)
            damage = None
    except (OSError, pa.ArrowException) as error:
        damage = f"{str(error).splitlines()[0][:200]}"
    return num_rows, used, damage


def _used(names: list[str], columns: Columns) -> Used:
    used = {
        "id": next(name for name in columns.id or (KEY,) if name in names),
        "caption": next(name for name in columns.caption if name in names),
        "image": columns.image or KEY,
    }
    if set(MARKS) <= set(names):
        used["status"] = MARKS[0]
    return used


def _rows(shard: pq.ParquetFile, used: Used) -> Iterator[dict[str, Any]]:
    wanted = list(dict.fromkeys(used.values()))
    for batch in shard.iter_batches(ROWS_PER_READ, columns=wanted):
        values = {name: _values(batch.column(name)) for name in wanted}
        for number in range(len(batch)):
            yield {name: column[number] for name, column in values.items()}


def _values(column: Any) -> list[Any]:
    """Bytes that are no UTF-8 stay bytes, which nothing takes for text."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return bytes(value.as_buffer())


def _add(row: dict[str, Any], used: Used, writer: CandidateWriter) -> None:
    if "status" in used and row[used["status"]] != "success":
        return writer.drop(Drop.not_downloaded)
    place = row[used["image"]]
    if used["image"] == KEY:
        key = as_id(place)
        place = None if key is None else f"{key[:SHARD_DIGITS]}/{key}"
    if not isinstance(place, str) or as_id(place) is None:
        return writer.drop(Drop.no_place)
    writer.add(row[used["id"]], row[used["caption"]], place)
