"""Reads every shard once. What was read is kept beside the build, so that a killed one goes on behind it."""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from morebench.data.subset.candidates import CandidateWriter
from morebench.data.subset.parquet import column_problem, scan_parquet
from morebench.data.subset.shards import Columns, Shard, Source
from morebench.data.subset.tar import scan_tar
from morebench.errors import ConfigError, RunError, join_problems
from morebench.processes import start_pool_process
from morebench.progress import Progress

VERSION = 1
SUFFIX = ".candidates"  # parquet, but never taken for a shard where a build lies in its own input
WORTH_PROCESSES = 2**26  # bytes of shards; fewer are read before a process has started


@dataclass(frozen=True)
class Scanned:
    """A shard and its candidates, which lie in `table`."""

    shard: Shard
    table: Path
    num_rows: int
    num_candidates: int
    drops: dict[str, int]
    used: dict[str, str]  # what for -> column
    damage: str | None
    problem: str | None  # the user's to mend


def scan(source: Source, seed: int, folder: Path, workers: int) -> list[Scanned]:
    """Raises ConfigError naming every shard without the columns asked for."""
    if source.images is not None:
        problems = [column_problem(shard.path, source.columns) for shard in source.shards]
        _raise(problem for problem in problems if problem)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {shard: folder / f"{_digest(shard, source.columns, seed)}{SUFFIX}" for shard in source.shards}
    found = {shard: known for shard, table in tables.items() if (known := _known(shard, table)) is not None}
    todo = [shard for shard in source.shards if shard not in found]
    work = partial(_scan, columns=source.columns, seed=seed)
    with Progress(f"{source.name} shards", len(tables), len(found)) as progress:
        for scanned in _run(work, [(shard, tables[shard]) for shard in todo], workers):
            found[scanned.shard] = scanned
            progress.update(len(found), scanned.shard.name)
    _raise(scanned.problem for scanned in found.values() if scanned.problem)
    return [found[shard] for shard in source.shards]


def _raise(problems: Iterator[str]) -> None:
    if lines := sorted(problems):
        raise ConfigError(join_problems(lines))


def _digest(shard: Shard, columns: Columns, seed: int) -> str:
    told = [VERSION, str(shard.path), shard.size, shard.mtime_ns, asdict(columns), seed]
    return sha256(json.dumps(told).encode()).hexdigest()[:32]


def _run(
    work: Callable[[tuple[Shard, Path]], Scanned], todo: Sequence[tuple[Shard, Path]], workers: int
) -> Iterator[Scanned]:
    if workers == 1 or len(todo) < 2 or sum(shard.size for shard, _ in todo) < WORTH_PROCESSES:
        yield from map(work, todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(todo)),
        context,
        initializer=start_pool_process,
    ) as pool:
        jobs = [pool.submit(work, item) for item in todo]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool:
            raise RunError(
                "a process that reads shards was ended from outside, for want of memory perhaps. "
                "Type the command again with workers=1; finished shards are kept."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _scan(item: tuple[Shard, Path], columns: Columns, seed: int) -> Scanned:
    shard, table = item
    aside = table.with_suffix(".part")
    problem = None
    with CandidateWriter(aside, seed) as writer:
        if shard.is_tar:
            num_rows, used, damage, problem = scan_tar(shard.path, columns, writer)
        else:
            num_rows, used, damage = scan_parquet(shard.path, columns, writer)
    aside.replace(table)
    drops = {reason.name: count for reason, count in sorted(writer.drops.items())}
    told = [num_rows, writer.num_candidates, drops, used, damage, problem]
    note = table.with_suffix(".json.part")
    note.write_text(json.dumps(told))
    note.replace(table.with_suffix(".json"))  # last: this is what says that the shard is done
    return Scanned(shard, table, num_rows, writer.num_candidates, drops, used, damage, problem)


def _known(shard: Shard, table: Path) -> Scanned | None:
    try:
        pq.read_metadata(table)
        return Scanned(shard, table, *json.loads(table.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return None  # not read yet, or damaged: read anew
