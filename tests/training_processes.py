"""Train in processes that may be killed, or that are the ranks of one run.

They are forked from a server that has imported everything and computed nothing, which is fast and safe.
"""

import ctypes
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.context import ForkProcess, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from morebench.config.schema import Config, Step
from morebench.errors import MorebenchError

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["morebench.training.run", "morebench.models.vision", "open_clip", "timm"])
NO_DISK = 99  # exit code where mounting one is not allowed
TIMEOUT = 120  # seconds; a hang is a failure, not a wait


def start(function: Callable[..., None], *arguments: Any, daemon: bool = True) -> ForkServerProcess:
    """`daemon`: it ends with the tests, and may have no processes of its own."""
    process = _CONTEXT.Process(target=_with_exit_code, args=(function, *arguments), daemon=daemon)
    process.start()
    return process


def finish(*processes: ForkServerProcess) -> list[int | None]:
    """Exit codes, in order; negative for a signal, None for a process that hung and was killed."""
    codes = []
    for process in processes:
        process.join(TIMEOUT)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def run_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    return finish(*start_ranks(world_size, function, *arguments))


def start_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> list[ForkServerProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_as_rank, rank, world_size, port, function, *arguments) for rank in range(world_size)]


class Forked:
    """In place of the context that starts ranks: forks them, and calls `before` in each of them.

    For a process that was started here: it has imported everything and computes nothing.
    """

    _context = get_context("fork")
    Pipe = staticmethod(_context.Pipe)

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before

    def Process(self, target: Callable[..., None], args: tuple[Any, ...]) -> ForkProcess:  # noqa: N802
        return self._context.Process(target=_after, args=(self._before, target, *args))


def _after(before: Callable[[], None], target: Callable[..., None], *arguments: Any) -> None:
    before()
    target(*arguments)


def train_step(config: Config, step: Step, folder: Path, parents: Mapping[Step, Path]) -> None:
    from morebench.training.run import train

    train(config, step, folder, parents)


def train_until_fsync(count: int, config: Config, step: Step, folder: Path) -> None:
    """SIGKILL before the `count`-th fsync, as a power cut would have it."""
    fsync, left = os.fsync, [count]

    def fatal_fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fatal_fsync
    train_step(config, step, folder, {})


def train_until_line(step_number: int, config: Config, step: Step, folder: Path) -> None:
    """SIGKILL in the middle of writing a step's metrics."""
    from morebench.training.telemetry import MetricsFile

    append = MetricsFile.append

    def fatal_append(self: MetricsFile, line: dict[str, Any]) -> None:
        if line["step"] == step_number:
            self._file.write('{"step": ')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, line)

    MetricsFile.append = fatal_append  # type: ignore[method-assign]
    train_step(config, step, folder, {})


def train_until_save(where: str, config: Config, step: Step, folder: Path) -> None:
    """SIGKILL in the first checkpoint of this start."""
    from morebench.training import writing

    save_file, replace, written = writing.save_file, writing.replace, []

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fatal_save(values: Any, path: Path) -> None:
        if written and where == "between files":
            die()
        written.append(path)
        save_file(values, path)
        if where == "in a file":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def fatal_replace(source: Path, target: Path) -> None:
        if where == "before the rename":
            die()
        replace(source, target)
        if where == "before the removal":
            die()

    writing.save_file, writing.replace = fatal_save, fatal_replace  # type: ignore[assignment]
    train_step(config, step, folder, {})


def train_on_a_full_disk(config: Config, step: Step, disk: Path, copy: Path) -> None:
    """Fills a disk of 256 KiB but for a few, trains until it is full, makes room, and trains to the end."""
    from morebench.errors import DiskFullError

    disk.mkdir()
    if not _mount(disk, "256k"):
        sys.exit(NO_DISK)
    filler, run = disk / "filler", disk / "run"
    run.mkdir()
    filler.write_bytes(bytes(215 * 1024))
    with pytest.raises(DiskFullError, match="No space left"):
        train_step(config, step, run, {})
    filler.unlink()
    train_step(config, step, run, {})
    shutil.copytree(run, copy)


def _mount(target: Path, size: str) -> bool:
    """A tmpfs that this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not libc.mount(b"none", os.fsencode(target), b"tmpfs", 0, f"size={size}".encode())


def _as_rank(rank: int, world_size: int, port: int, function: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    function(*arguments)


def _with_exit_code(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except MorebenchError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
