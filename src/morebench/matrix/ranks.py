"""The ranks of one train step on this machine: processes of their own, and one outcome of all of them.

The process that starts them leads: it holds the lock, ships to MLflow and writes DONE, and computes nothing.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOBase
from math import inf
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TextIO

from morebench.config.schema import Config, Step, Trainer
from morebench.errors import (
    EXIT_DISK_FULL,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NAN,
    EXIT_USER,
    ConfigError,
    Interrupted,
    RankError,
    outcome_of,
)
from morebench.processes import (
    exit_text,
    leave_with_parent,
    log_to_stderr,
    signals_held,
    usable_cores,
)
from morebench.training.fence import Fence
from morebench.training.signals import ASKING, StopRequest

# The most telling first. What a retry cannot mend must not hide behind what it can. A rank says "interrupted"
# only once the state is saved, so that whatever befalls another one then has cost nothing.
_SEVERITY = (EXIT_USER, EXIT_NAN, EXIT_DISK_FULL, EXIT_INTERRUPTED, EXIT_FAILED)
_POLL_S = 0.2  # how soon a signal to the leader reaches the ranks
_GRACE_S = 15.0  # how long the others may take to end by themselves after one has failed
_CONTEXT: BaseContext = multiprocessing.get_context("spawn")  # a fork would share what a library began


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    rank: int
    code: int
    message: str
    said: bool  # by itself; otherwise its process died

    @property
    def is_polite(self) -> bool:
        """All ranks have agreed on it: the others are about to do the same, and may still be saving."""
        return self.said and self.code in (EXIT_DONE, EXIT_INTERRUPTED)


def local_ranks(trainer: Trainer) -> int:
    """How many processes a train step starts here; 1: it trains in the process that leads it.

    Raises ConfigError for several machines without a cluster.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:  # srun has started one process a rank
        return 1
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}: only a cluster starts ranks on several machines. "
            "Here it must be trainer.num_nodes=1."
        )
    if trainer.devices != "auto":
        return int(trainer.devices)
    if trainer.accelerator == "cpu":
        return 1
    from morebench.training.strategy import num_devices

    return num_devices(trainer)


def train_in_ranks(
    config: Config, step: Step, folder: Path, parents: Mapping[Step, Path], world_size: int, fence: Fence
) -> None:
    """Raises Interrupted, or RankError with the exit code and the message of the most telling rank; or what
    `fence` does, which every rank asks as well.

    TERM, USR1 and USR2 are handed to every rank. When one fails the others cannot take another step: they
    may end by themselves, because some failures come on all ranks and the first may be writing, and are
    killed after a grace.
    """
    _free_devices()
    environment = _environment(config.trainer, world_size)
    ranks: list[_Rank] = []
    with StopRequest() as stop:
        try:
            for number in range(world_size):
                ranks.append(_Rank(number, environment, config, step, folder, parents, fence))
            ends = _wait(ranks, stop, folder)
        finally:
            for rank in ranks:
                rank.leave()
    if any(end.code != EXIT_DONE for end in ends):
        fence()
    _raise_worst(ends)


def _free_devices() -> None:
    """What an evaluate step of this process keeps for later would be missing on the first rank's device."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _environment(trainer: Trainer, world_size: int) -> dict[str, str]:
    threads = str(trainer.threads or max(1, usable_cores() // world_size))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }


class _Rank:
    def __init__(self, number: int, environment: Mapping[str, str], *arguments: object) -> None:
        self.number = number
        self.end: End | None = None
        self.connection, theirs = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(  # type: ignore[attr-defined]
            target=_rank, args=(theirs, number, dict(environment), *arguments)
        )
        with signals_held(signal.SIGINT, *ASKING):  # inherited: none can end it before it is ready for them
            self.process.start()
        theirs.close()

    def look(self, folder: Path) -> None:
        """Set `end` when it has said how it ended, or died."""
        died = not self.process.is_alive()
        try:
            if self.connection.poll():
                code, message = self.connection.recv()
                self.end = End(self.number, code, message, said=True)
        except (EOFError, OSError):
            pass  # its process is about to end
        if self.end is None and died:
            exit_code = self.process.exitcode
            known = exit_code if exit_code in _SEVERITY else EXIT_FAILED
            text = f"its process died ({exit_text(exit_code)}); see {folder / 'log.txt'}"
            self.end = End(self.number, known, text, said=False)

    @property
    def was_killed(self) -> bool:
        return self.process.exitcode == -signal.SIGKILL

    def send(self, number: signal.Signals) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def leave(self) -> None:
        """A rank that has told its end may still be stuck in a library; one that has not is of no use."""
        self.process.join(_GRACE_S if self.end is not None else 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _wait(ranks: Sequence[_Rank], stop: StopRequest, folder: Path) -> list[End]:
    """In the order they came; without the ranks that had to be killed because another had failed."""
    ends: list[End] = []
    is_told, until = False, inf
    while (running := [rank for rank in ranks if rank.end is None]) and time.monotonic() < until:
        if stop.signal_name is not None and not is_told:
            is_told = True
            for rank in running:
                rank.send(signal.Signals[stop.signal_name])
        wait([rank.process.sentinel for rank in running], timeout=_POLL_S)
        for rank in running:
            rank.look(folder)
        # nothing that one rank does ends another with SIGKILL, so that is the cause
        new = sorted((rank for rank in running if rank.end is not None), key=lambda rank: not rank.was_killed)
        ends += [rank.end for rank in new if rank.end is not None]
        if until == inf and not all(end.is_polite for end in ends):
            until = time.monotonic() + _GRACE_S
    return ends


def _raise_worst(ends: Sequence[End]) -> None:
    bad = [end for end in ends if end.code != EXIT_DONE]
    if not bad:
        return
    worst = min(bad, key=lambda end: _SEVERITY.index(end.code))
    if worst.code == EXIT_INTERRUPTED and worst.said:
        raise Interrupted(worst.message)
    raise RankError(f"rank {worst.rank}: {worst.message}", worst.code)


def _rank(
    connection: Connection,
    number: int,
    environment: Mapping[str, str],
    config: Config,
    step: Step,
    folder: Path,
    parents: Mapping[Step, Path],
    fence: Fence,
) -> None:
    """A rank's life. The signals stay held until training is under way (Saver), so that all ranks see them
    at an optimizer step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which sends TERM
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    leave_with_parent(signal.SIGKILL)  # without it nobody holds the lock that lets a rank write
    os.environ |= {**environment, "LOCAL_RANK": str(number)}
    os.environ.pop("SLURM_NTASKS", None)  # the job has one task; the ranks are ours
    sys.stdout = sys.stderr = _Tagged(sys.stderr, f"rank {number} | ")
    log_to_stderr()
    try:
        from morebench.training.run import train

        train(config, step, folder, parents, fence)
        code, message = EXIT_DONE, ""
    except Exception as error:
        code, message, is_expected = outcome_of(error)
        if not is_expected:
            logging.getLogger(__name__).error(traceback.format_exc())
    connection.send((code, message))
    connection.close()
    sys.stderr.flush()


class _Tagged(TextIOBase):
    """Text whose lines say whose they are; a line is written at once, so that ranks do not mix theirs."""

    def __init__(self, stream: TextIO, tag: str) -> None:
        self._stream, self._tag, self._rest = stream, tag, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._tag}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False  # a bar of each rank would overwrite the others'
