"""Reads, hashes and decodes images in processes of its own, and keeps what it learnt.

A killed check goes on where it was: finished parts lie in `looked/`. A good image whose file has kept its
size and times is not read again. The caller holds a lock on the folder.
"""

import os
import shutil
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

from morebench.data.aside import replace_file
from morebench.data.findings import Kind, SampleError
from morebench.data.image_folder import ImageFolder
from morebench.data.images import read_image
from morebench.data.inspection import inspect_image
from morebench.processes import interrupts_held, start_pool_process
from morebench.progress import Progress

VERSION = "2"
TABLE, PARTS = "images.arrow", "looked"
PART = 4096  # images that a killed check looks at again, at most
CHUNK = 64  # images a process takes at a time
THREADS = 2  # of a process: one waits for a file while the other decodes
ABSENT = (-1, -1, -1)  # size and times of what is not there, or must not be read
# of a file; the last tells of a change that kept the others, as `cp -a` does
FACTS = ("size", "mtime_ns", "ctime_ns")

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "ctime_ns": pa.int64(),
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
    ctime_ns: int
    sha256: bytes
    kind: str | None
    reason: str | None
    odd: list[dict[str, str]]


def look(images: ImageFolder, name: str) -> Look:
    try:
        path = images.path(name)
        facts = _facts(images, name)
        content = read_image(path)
    except SampleError as error:
        return _unseen(name, error.kind, error.reason)
    seen = inspect_image(content, name)
    kind, reason = (None, None) if seen.problem is None else (seen.problem[0].name, seen.problem[1])
    odd = [{"kind": odd.name, "reason": told} for odd, told in seen.oddities]
    return Look(name, *facts, sha256(content).digest(), kind, reason, odd)


def _unseen(name: str, kind: Kind, reason: str) -> Look:
    return Look(name, *ABSENT, b"", kind.name, reason, [])


def facts_now(images: ImageFolder, names: Sequence[str], threads: int = 16) -> np.ndarray:
    """int64 [N, 3]: `FACTS` of the files as they are now; `ABSENT` where none can be asked.

    Threads, because a file of a shared file system takes a millisecond to answer.
    """

    def ask(chunk: Sequence[str]) -> list[tuple[int, int, int]]:
        return [_facts(images, name) for name in chunk]

    chunks = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(threads) as pool:
        found = [facts for some in pool.map(ask, chunks) for facts in some]
    return np.array(found, np.int64).reshape(-1, len(FACTS))


def _facts(images: ImageFolder, name: str) -> tuple[int, int, int]:
    try:
        stat = images.path(name).stat()
    except (OSError, SampleError):
        return ABSENT
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def look_at_all(
    names: Sequence[str],
    images: ImageFolder,
    folder: Path,
    workers: int,
    look: Callable[[ImageFolder, str], Look] = look,
    again: bool = False,
) -> tuple[pa.Table, int]:
    """What is known of `names`, in their order, and how many had to be looked at now.

    workers: processes; 0 is this one, which an image may then end.
    again: nothing counts as known.
    """
    if again:
        remove_parts(folder)
    known = SCHEMA.empty_table() if again else _known(folder)
    wanted = pa.array(names, pa.string())
    rows = pc.index_in(wanted, value_set=known.column("name").combine_chunks()).fill_null(-1).to_numpy()
    usable = known.column("kind").is_null().to_numpy()
    then = np.full((len(names), len(FACTS)), -2, np.int64)
    seen = np.flatnonzero(rows >= 0)
    seen = seen[usable[rows[seen]]]  # what had a problem may have been mended
    for column, key in enumerate(FACTS):
        then[seen, column] = known.column(key).to_numpy()[rows[seen]]
    todo = np.flatnonzero((facts_now(images, names) != then).any(axis=1)).tolist()
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
    places = pc.index_in(wanted, value_set=known.column("name").combine_chunks())
    assert places.null_count == 0, f"{places.null_count} images were not looked at"
    return known.take(places).combine_chunks(), len(todo)


def write_table(table: pa.Table, folder: Path) -> None:
    replace_file(folder / TABLE, lambda aside: _write(table, aside))


def remove_parts(folder: Path) -> None:
    """Once the table is written that was made of them."""
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
    table = _table(looks)
    name = sha256("\0".join(one.name for one in looks).encode()).hexdigest()[:16]
    replace_file(parts / f"{name}.arrow", lambda aside: _write(table, aside))
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
    if workers == 0:
        yield from ([work(name)] for name in names)
        return
    waiting = deque(names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
    while waiting:
        running: dict[Future[list[Look]], Sequence[str]] = {}
        with _pool(min(workers, len(waiting))) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        with interrupts_held():
                            future = pool.submit(_look_at_chunk, work, waiting[0])  # raises if one has died
                        running[future] = waiting.popleft()
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
                    with interrupts_held():
                        future = pool.submit(_look_at_chunk, work, [waiting[0]])
                    found = future.result()
                    waiting.popleft()
                    yield found
            except BrokenProcessPool:
                reason = "the process that decoded it was ended, for want of memory perhaps"
                yield [_unseen(waiting.popleft(), Kind.crashed, reason)]


def _pool(workers: int) -> ProcessPoolExecutor:
    """Not forked: a fork would inherit locked threads."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _start)


def _start() -> None:
    """The parent alone speaks: libtiff writes to stderr about every damaged file."""
    start_pool_process()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _look_at_chunk(work: Callable[[str], Look], names: Sequence[str]) -> list[Look]:
    """In threads, so that files are waited for while others are decoded."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))
