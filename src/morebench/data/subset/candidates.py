"""The rows of a shard that have an id, a caption and a place to look for the image, each with its rank."""

from collections import Counter
from hashlib import blake2b
from math import isnan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from morebench.data.subset.drops import Drop

ROWS_PER_WRITE = 20_000
RANKS = 2**64

SCHEMA = pa.schema(
    [
        ("rank", pa.uint64()),  # uniform, so that a share of all ranks is that share of all candidates
        ("rest", pa.uint64()),  # with `rank` 128 bits of hash: equal only for equal ids
        ("tie", pa.uint64()),  # orders candidates of one id by what they hold, not by where they lie
        ("id", pa.large_string()),
        ("caption", pa.large_string()),
        ("place", pa.large_string()),  # path below the image folder, or the suffix of a tar member
        ("offset", pa.int64()),  # of the image in the tar, bytes
        ("size", pa.int64()),
    ]
)


def rank_of(sample_id: str, seed: int) -> tuple[int, int]:
    """A keyed hash, so that every seed orders the ids anew and none needs the others."""
    digest = blake2b(sample_id.encode(), digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class CandidateWriter:
    """Writes candidates to a parquet file and counts what is not one."""

    def __init__(self, path: Path, seed: int) -> None:
        self._seed = seed
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self.drops: Counter[Drop] = Counter()
        self.num_candidates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def drop(self, reason: Drop) -> None:
        self.drops[reason] += 1

    def add(
        self,
        raw_id: object,
        caption: object,
        place: str,
        offset: int = 0,
        size: int = 0,
        content: bytes = b"",
    ) -> None:
        """`content` is a hash of the image where it is at hand already."""
        if (sample_id := as_id(raw_id)) is None:
            return self.drop(Drop.no_id)
        if (problem := _caption_problem(caption)) is not None:
            return self.drop(problem)
        assert isinstance(caption, str)
        rank, rest = rank_of(sample_id, self._seed)
        tie = blake2b(f"{len(caption)} {caption}{place}".encode() + content, digest_size=8).digest()
        row = (rank, rest, int.from_bytes(tie, "little"), sample_id, caption, place, offset, size)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        self.num_candidates += 1
        if len(self._columns["rank"]) >= ROWS_PER_WRITE:
            self._flush()

    def _flush(self) -> None:
        if self._columns["rank"]:
            self._file.write_table(pa.table(self._columns, schema=SCHEMA))
            self._columns = {name: [] for name in SCHEMA.names}


def as_id(raw: object) -> str | None:
    """LAION-400M stores its whole numbers as float64."""
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, str | int):
        return None
    return str(raw) if raw != "" and _is_unicode(str(raw)) else None


def _caption_problem(caption: object) -> Drop | None:
    if caption is None or (isinstance(caption, float) and isnan(caption)):
        return Drop.no_caption
    if not isinstance(caption, str) or not _is_unicode(caption):
        return Drop.caption_not_text
    return None if caption.strip() else Drop.no_caption


def _is_unicode(text: str) -> bool:
    """JSON may spell half a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True
