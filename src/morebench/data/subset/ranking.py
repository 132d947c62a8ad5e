"""Candidates of all shards in the order of their ranks, without ever holding all of them."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from morebench.data.subset.candidates import RANKS, SCHEMA
from morebench.data.subset.scan import Scanned

Candidate = dict[str, Any]  # the columns of `candidates.SCHEMA` and `shard`, the number of its shard

LEAST_WAVE = 50_000  # candidates; a smaller wave is not worth another reading of the tables
SURPLUS = 1.25


def digest(scanned: Sequence[Scanned]) -> str:
    """Names the candidates, and with them their order."""
    return sha256("\n".join(sorted(one.table.stem for one in scanned)).encode()).hexdigest()[:32]


def in_rank_order(scanned: Sequence[Scanned], wanted: int, chunk: int) -> Iterator[list[Candidate]]:
    """Chunks of candidates, held in waves of somewhat more than `wanted` at a time."""
    total = sum(one.num_candidates for one in scanned)
    size = max(LEAST_WAVE, int(wanted * SURPLUS))
    num_waves = max(1, -(-total // size))
    for wave in range(num_waves):
        first, end = RANKS * wave // num_waves, RANKS * (wave + 1) // num_waves
        parts = [_read(one, number, first, end - 1) for number, one in enumerate(scanned)]
        table = pa.concat_tables(parts).combine_chunks()
        order = pc.sort_indices(table, [(key, "ascending") for key in ("rank", "rest", "tie")])
        for start in range(0, len(order), chunk):
            yield table.take(order[start : start + chunk]).to_pylist()


def _read(scanned: Scanned, number: int, first: int, last: int) -> pa.Table:
    """The candidates with ranks from `first` to `last`."""
    kept = []
    with pq.ParquetFile(scanned.table) as file:
        for batch in file.iter_batches():
            rank = batch.column("rank")
            inside = pc.and_(
                pc.greater_equal(rank, pa.scalar(first, pa.uint64())),
                pc.less_equal(rank, pa.scalar(last, pa.uint64())),
            )
            kept.append(batch.filter(inside))
    table = pa.Table.from_batches(kept, SCHEMA)
    return table.append_column("shard", pa.array([number] * len(table), pa.int32()))
