"""Reads, hashes and decodes images in processes of its own, and keeps what it learnt.

A killed check goes on where it was: finished parts lie in `looked/`. An image whose file has kept its size
and time is not read again.
"""

import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from morebench.data.findings import Kind, SampleError
from morebench.data.image_folder import ImageFolder
from morebench.data.images import read_image
from morebench.data.inspection import inspect_image
from morebench.progress import Progress

VERSION = "1"
TABLE, PARTS = "images.arrow", "looked"
PART = 4096  # images that a killed check looks at again, at most
CHUNK = 64  # images a process takes at a time
THREADS = 4  # of a process
WORTH_PROCESSES = 256  # images; fewer are decoded before a process has started
ABSENT = (-1, -1)  # size and time of what is not there, or must not be read

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "sha256": pa.binary(),  # empty where the file cannot be read
        "kind": pa.string(),  # why it cannot be used; null if it can
        "reason": pa.string(),
        "odd": pa.list_(pa.struct({"kind": pa.string(), "reason": pa.string()})),  # kept all the same
    },
    metadata={"version": VERSION},
)


class Look(NamedTuple):
    """One row of the table."""

    name: str
    size: int
    mtime_ns: int
    sha256: bytes
    kind: str | None
    reason: str | None
    odd: list[dict[str, str]]


def look(images: ImageFolder, name: str) -> Look:
    try:
        path = images.path(name)
        size, mtime_ns = _size_and_time(images, name)
        content = read_image(path)
    except SampleError as error:
        return _unseen(name, error.kind, error.reason)
    seen = inspect_image(content, name)
    kind, reason = (None, None) if seen.problem is None else (seen.problem[0].name, seen.problem[1])
    odd = [{"kind": odd.name, "reason": told} for odd, told in seen.oddities]
    return Look(name, size, mtime_ns, sha256(content).digest(), kind, reason, odd)


def _unseen(name: str, kind: Kind, reason: str) -> Look:
    return Look(name, *ABSENT, b"", kind.name, reason, [])


def sizes_and_times(images: ImageFolder, names: Sequence[str], threads: int = 16) -> np.ndarray:
    """int64 [N, 2] of the files as they are now; `ABSENT` where none can be asked.

    Threads, because a file of a shared file system takes a millisecond to answer.
    """

    def ask(chunk: Sequence[str]) -> list[tuple[int, int]]:
        return [_size_and_time(images, name) for name in chunk]

    chunks = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(threads) as pool:
        found = [pair for pairs in pool.map(ask, chunks) for pair in pairs]
    return np.array(found, np.int64).reshape(-1, 2)


def _size_and_time(images: ImageFolder, name: str) -> tuple[int, int]:
    try:
        stat = images.path(name).stat()
    except (OSError, SampleError):
        return ABSENT
    return stat.st_size, stat.st_mtime_ns


def look_at_all(
    names: Sequence[str],
    images: ImageFolder,
    folder: Path,
    workers: int,
    look: Callable[[ImageFolder, str], Look] = look,
) -> tuple[pa.Table, int]:
    """What is known of `names`, in their order, and how many had to be looked at now."""
    known = _known(folder)
    wanted = pa.array(names, pa.string())
    rows = pc.index_in(wanted, value_set=known.column("name").combine_chunks()).fill_null(-1).to_numpy()
    now = sizes_and_times(images, names)
    then = np.full((len(names), 2), -2, np.int64)
    for column, key in enumerate(("size", "mtime_ns")):
        then[rows >= 0, column] = known.column(key).to_numpy()[rows[rows >= 0]]
    todo = np.flatnonzero((now != then).any(axis=1) | (now == ABSENT).any(axis=1)).tolist()
    found, part = [SCHEMA.empty_table()], list[Look]()
    done = len(names) - len(todo)
    with Progress("images", len(names), done) as progress:
        for looks in _spread(partial(look, images), [names[number] for number in todo], workers):
            part += looks
            done += len(looks)
            progress.update(done)
            if len(part) >= PART:
                found.append(_keep(part, folder / PARTS))
                part.clear()
    known = _with(known, pa.concat_tables([*found, _table(part)]))
    table = known.take(pc.index_in(wanted, value_set=known.column("name").combine_chunks()))
    return table.combine_chunks(), len(todo)


def write_table(table: pa.Table, folder: Path) -> None:
    """The parts that it was made of go."""
    aside = folder / f"{TABLE}.tmp-{os.getpid()}"
    _write(table, aside)
    aside.replace(folder / TABLE)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def read_table(path: Path) -> pa.Table | None:
    """Memory-mapped; None for a file that is absent, damaged or of another version."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    return table if table.schema.equals(SCHEMA, check_metadata=True) else None


def _known(folder: Path) -> pa.Table:
    paths = [folder / TABLE, *sorted((folder / PARTS).glob("*.arrow"))]
    known = SCHEMA.empty_table()
    for path in paths:
        if (table := read_table(path)) is not None:
            known = _with(known, table)
    return known


def _with(known: pa.Table, newer: pa.Table) -> pa.Table:
    """Every name once: what is newer counts."""
    older = pc.invert(pc.is_in(known.column("name"), value_set=newer.column("name").combine_chunks()))
    return pa.concat_tables([known.filter(older), newer])


def _keep(looks: Sequence[Look], parts: Path) -> pa.Table:
    parts.mkdir(parents=True, exist_ok=True)
    table = _table(looks)
    name = sha256("\0".join(one.name for one in looks).encode()).hexdigest()[:16]
    aside = parts / f"{name}.tmp-{os.getpid()}"
    _write(table, aside)
    aside.replace(parts / f"{name}.arrow")
    return table


def _table(looks: Sequence[Look]) -> pa.Table:
    columns = list(zip(*looks, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _write(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


def _spread(work: Callable[[str], Look], names: Sequence[str], workers: int) -> Iterator[list[Look]]:
    """In any order. An image that ends the process which decodes it is a finding like any other."""
    if len(names) < WORTH_PROCESSES:
        yield from ([work(name)] for name in names)
        return
    waiting = deque(names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
    while waiting:
        running: dict[Future[list[Look]], Sequence[str]] = {}
        with _pool(workers) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        chunk = waiting.popleft()
                        running[pool.submit(_look_at_chunk, work, chunk)] = chunk
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        del running[future]
                        yield found
            except BrokenProcessPool:
                for future in list(running):
                    if future.done() and future.exception() is None:
                        running.pop(future)
                        yield future.result()
        for chunk in running.values():  # one of these ended a process
            yield from _one_by_one(work, chunk)


def _one_by_one(work: Callable[[str], Look], names: Sequence[str]) -> Iterator[list[Look]]:
    waiting = deque(names)
    while waiting:
        with _pool(1) as pool:
            try:
                while waiting:
                    found = pool.submit(_look_at_chunk, work, [waiting[0]]).result()
                    waiting.popleft()
                    yield found
            except BrokenProcessPool:
                reason = "the process that decoded it was ended, for want of memory perhaps"
                yield [_unseen(waiting.popleft(), Kind.crashed, reason)]


def _pool(workers: int) -> ProcessPoolExecutor:
    """Not forked: a fork would inherit locked threads."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _start)


def _start() -> None:
    """The parent alone acts on Ctrl-C and speaks: libtiff writes to stderr about every damaged file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _look_at_chunk(work: Callable[[str], Look], names: Sequence[str]) -> list[Look]:
    """In threads, so that files are waited for while others are decoded."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))
