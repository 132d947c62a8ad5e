"""Where chunks are answered: in this process on one device, or in one process for each of several.

Whoever asks for answers is the only one that writes. Chunks are dealt as devices become free, which changes
when an answer comes, never what it is.
"""

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morebench.config.schema import Config, Trainer
from morebench.errors import EXIT_FAILED, EXIT_USER, ConfigError, RankError, outcome_of
from morebench.processes import exit_text, leave_with_parent, log_to_stderr, signals_held, usable_cores
from morebench.training.signals import ASKING, StopRequest

if TYPE_CHECKING:  # a spawned process chooses its number of threads before it imports torch
    from morebench.evaluation.asking import Answered, Asked

_CONTEXT: BaseContext = multiprocessing.get_context("spawn")  # a fork would share what a library began
_POLL_S = 0.2  # how soon a request to stop is seen
_GRACE_S = 30.0  # how long chunks in the making are waited for after one; launchers wait for 60


def devices_for(trainer: Trainer) -> list[str]:
    """One for each process; several are on this machine, whatever `num_nodes` says. Raises ConfigError."""
    import torch

    from morebench.training.strategy import check_gpu, num_devices

    check_gpu(trainer)
    count = num_devices(trainer)
    if trainer.accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return ["cpu"] * count
    if count > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={count}: torch finds {torch.cuda.device_count()} GPUs here. Choose as many or "
            "fewer, or trainer.devices=auto."
        )
    return [f"cuda:{number}" for number in range(count)]


def answers(
    config: Config,
    parent: Path,
    devices: Sequence[str],
    asked: "Asked",
    chunks: Sequence[Sequence[int]],
    stop: StopRequest,
) -> Iterator[tuple[int, "Answered"]]:
    """(place in `chunks`, answers) as they come; after a request to stop those in the making, and no more.

    Raises what the chunk that cannot be answered raises, or RankError with that exit code from another
    process; RankError too when a process dies.
    """
    if not chunks:
        return
    if len(devices) == 1:
        from morebench.evaluation.asking import answering

        with answering(config, parent, devices[0], asked) as answer:
            for number, chunk in enumerate(chunks):
                if stop.signal_name is not None:
                    return
                yield number, answer(chunk)
        return
    threads = config.trainer.threads or max(1, usable_cores() // len(devices))
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    processes: list[_Process] = []
    try:
        for number, device in enumerate(devices[: len(chunks)]):
            processes.append(_Process(number, device, environment, config, parent, asked.digest))
        yield from _deal(processes, deque(enumerate(chunks)), stop)
    finally:
        for process in processes:
            process.leave()


def _deal(
    processes: Sequence["_Process"], waiting: deque[tuple[int, Sequence[int]]], stop: StopRequest
) -> Iterator[tuple[int, "Answered"]]:
    until: float | None = None
    for process in processes:
        process.answer(*waiting.popleft())
    while busy := [process for process in processes if process.chunk is not None]:
        if stop.signal_name is not None:
            waiting.clear()
            until = until or time.monotonic() + _GRACE_S
            if time.monotonic() > until:
                return
        wait([handle for process in busy for handle in process.handles], timeout=_POLL_S)
        new = [(process.number, found) for process in busy if (found := process.look()) is not None]
        for process in busy:  # before the answers are saved: a device should not wait for a disk
            if process.chunk is None and waiting and stop.signal_name is None:
                process.answer(*waiting.popleft())
        yield from new
        if ends := [process.end for process in busy if process.end is not None]:
            raise _worst(ends)


def _worst(ends: Sequence[RankError]) -> RankError:
    """What a retry cannot mend before what it can."""
    return min(ends, key=lambda end: (end.exit_code != EXIT_USER, end.exit_code == EXIT_FAILED))


class _Process:
    """One device's. It has one chunk at a time."""

    def __init__(self, number: int, device: str, *arguments: object) -> None:
        self.name = f"evaluate process {number} ({device})"
        self.chunk: Sequence[int] | None = None
        self.number = 0  # of the chunk
        self.end: RankError | None = None
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, device, *arguments), name=self.name
        )
        with signals_held(signal.SIGINT, *ASKING):  # inherited: the parent alone decides when to stop
            self._process.start()
        theirs.close()

    @property
    def handles(self) -> tuple[Any, ...]:
        return self._connection, self._process.sentinel

    def answer(self, number: int, chunk: Sequence[int]) -> None:
        self.number, self.chunk = number, chunk
        with suppress(OSError):  # it died: `look` says how
            self._connection.send(list(chunk))

    def look(self) -> "Answered | None":
        """Its answers if they are there; otherwise sets `end` when it failed or died."""
        died = not self._process.is_alive()
        try:
            if self._connection.poll():
                found, failure = self._connection.recv()
                if failure is None:
                    self.chunk = None
                    answered: Answered = found
                    return answered
                code, message = failure
                self.end = RankError(f"{self.name}: {message}", code)
                return None
        except (EOFError, OSError):
            died = True
        if died:
            self._process.join(1)
            self.end = RankError(
                f"{self.name} died ({exit_text(self._process.exitcode)}) over {len(self.chunk or ())} "
                "questions. What was answered so far is kept; the next start goes on. See the run's log.txt.",
                EXIT_FAILED,
            )
        return None

    def leave(self) -> None:
        self._connection.close()
        self._process.kill()  # it holds nothing that is not computed again
        self._process.join()


def _serve(
    connection: Connection,
    device: str,
    environment: Mapping[str, str],
    config: Config,
    parent: Path,
    digest: str,
) -> None:
    """A process's life: chunks come in, answers go out."""
    for number in (signal.SIGINT, *ASKING):
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent(signal.SIGKILL)
    os.environ |= environment
    log_to_stderr()
    try:
        for answered in _answers(_received(connection), device, config, parent, digest):
            connection.send((answered, None))
    except BrokenPipeError:
        return  # the parent has given up
    except Exception as error:
        code, message, is_expected = outcome_of(error)
        if not is_expected:
            logging.getLogger(__name__).error(traceback.format_exc())
        connection.send((None, (code, message)))


def _received(connection: Connection) -> Iterator[Sequence[int]]:
    while True:
        try:
            yield connection.recv()
        except EOFError:  # the parent needs no more
            return


def _answers(
    chunks: Iterable[Sequence[int]], device: str, config: Config, parent: Path, digest: str
) -> "Iterator[Answered]":
    from morebench.evaluation.asking import answering, ask
    from morebench.evaluation.sheets import open_sheets

    asked = ask(config, open_sheets(config))
    if asked.digest != digest:
        raise ConfigError("The tasks' records or images changed while they were read. Start again.")
    with answering(config, parent, device, asked) as answer:
        for chunk in chunks:
            yield answer(chunk)
