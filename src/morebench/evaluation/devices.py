"""Where questions are answered: in this process on one device, or in one process for each of several.

Whoever asks for answers is the only one that writes. Jobs are dealt as devices become free, which changes
when an answer comes, never what it is.
"""

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from morebench.config.schema import Config, Trainer
from morebench.errors import EXIT_FAILED, EXIT_USER, ConfigError, DataError, RankError, outcome_of
from morebench.processes import exit_text, leave_with_parent, log_to_stderr, signals_held, usable_cores
from morebench.training.signals import ASKING, StopRequest

if TYPE_CHECKING:  # a spawned process chooses its number of threads before it imports torch
    from morebench.evaluation.asking import Answered, Answering, Asked, Job

_CONTEXT: BaseContext = multiprocessing.get_context("spawn")  # a fork would share what a library began
_POLL_S = 0.2  # how soon a request to stop is seen
_GRACE_S = 30.0  # how long answers in the making are then waited for; launchers wait for 60


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


class Devices(Protocol):
    cache_positions: int  # of the LLM's cache that each has room for

    def answers(self, jobs: Sequence["Job"], stop: StopRequest) -> Iterator[tuple[int, "Answered"]]:
        """(place in `jobs`, answers) as they come; after a request to stop those in the making, no more.

        Raises what `Answering.answer` raises; in other processes that is a RankError with that exit code, and
        a process that dies is one too.
        """


@contextmanager
def opened(config: Config, parent: Path, devices: Sequence[str], asked: "Asked") -> Iterator[Devices]:
    """With the model of the finetune run `parent` on each. Raises WeightsError, or RankError."""
    if len(devices) == 1:
        from morebench.evaluation.asking import answering

        with answering(config, parent, devices[0], asked) as here:
            yield _Here(here)
        return
    threads = config.trainer.threads or max(1, usable_cores() // len(devices))
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    processes: list[Process] = []
    try:
        for number, device in enumerate(devices):
            name = f"evaluate process {number} ({device})"
            processes.append(Process(name, _serve, device, environment, config, parent, asked.digest))
        yield Processes(processes)
    finally:
        for process in processes:
            process.leave()


class _Here:
    def __init__(self, answering: "Answering") -> None:
        self._answering = answering
        self.cache_positions = answering.cache_positions

    def answers(self, jobs: Sequence["Job"], stop: StopRequest) -> Iterator[tuple[int, "Answered"]]:
        for number, job in enumerate(jobs):
            if stop.signal_name is not None:
                return
            yield number, self._answering.answer(job)


class Processes:
    def __init__(self, processes: Sequence["Process"]) -> None:
        self._processes = processes
        self.cache_positions = min(process.ready() for process in processes)

    def answers(self, jobs: Sequence["Job"], stop: StopRequest) -> Iterator[tuple[int, "Answered"]]:
        waiting = deque(enumerate(jobs))
        until = inf
        self._deal(waiting)
        while (
            busy := [process for process in self._processes if process.is_busy]
        ) and time.monotonic() < until:
            wait([handle for process in busy for handle in process.handles], timeout=_POLL_S)
            new = [found for process in busy if (found := process.look()) is not None]
            if stop.signal_name is not None or any(process.end for process in busy):
                waiting.clear()
                until = min(until, time.monotonic() + _GRACE_S)
            self._deal(waiting)  # before the answers are saved: a device should not wait for a disk
            yield from new
        if ends := [process.end for process in self._processes if process.end is not None]:
            raise _worst(ends)

    def _deal(self, waiting: "deque[tuple[int, Job]]") -> None:
        for process in self._processes:
            if waiting and process.number is None:
                process.answer(*waiting.popleft())


def _worst(ends: Sequence[RankError]) -> RankError:
    """What a retry cannot mend before what it can."""
    return min(ends, key=lambda end: (end.exit_code != EXIT_USER, end.exit_code == EXIT_FAILED))


class Process:
    """One device's. It has one job at a time.

    `serve` gets a connection: it sends (cache_positions, None) and then, for every job, (answers, None); or
    (None, (exit code, message)) and ends.
    """

    def __init__(self, name: str, serve: Callable[..., None], *arguments: object) -> None:
        self.name = name
        self.number: int | None = None  # of the job it has
        self.end: RankError | None = None
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, *arguments), name=name
        )
        with signals_held(signal.SIGINT, *ASKING):  # inherited: the parent alone decides when to stop
            self._process.start()
        theirs.close()

    @property
    def handles(self) -> tuple[Any, ...]:
        return self._connection, self._process.sentinel

    @property
    def is_busy(self) -> bool:
        return self.number is not None and self.end is None

    def ready(self) -> int:
        """Its `cache_positions`, once the model is loaded. Raises RankError."""
        wait(self.handles)
        found = self._receive()
        if self.end is not None:
            raise self.end
        return int(found)

    def answer(self, number: int, job: "Job") -> None:
        self.number = number
        with suppress(OSError):  # it died: `look` says how
            self._connection.send(job)

    def look(self) -> "tuple[int, Answered] | None":
        """Its job's number and answers if they are there; otherwise sets `end` when it failed or died."""
        found = self._receive()
        if found is None:
            return None
        number, self.number = self.number, None
        assert number is not None
        return number, found

    def _receive(self) -> Any:
        died = not self._process.is_alive()  # asked first: what it sent before is still there
        try:
            if self._connection.poll():
                found, failure = self._connection.recv()
                if failure is not None:
                    code, message = failure
                    self.end = RankError(f"{self.name}: {message}", code)
                return found
        except (EOFError, OSError):
            died = True
        if died:
            self._process.join(1)
            how = exit_text(self._process.exitcode)
            self.end = RankError(
                f"{self.name} died ({how}). What was answered so far is kept; the next start goes on. "
                "See the run's log.txt.",
                EXIT_FAILED,
            )
        return None

    def leave(self) -> None:
        self._process.kill()  # it holds nothing that is not computed again
        self._process.join()
        self._connection.close()


def _serve(
    connection: Connection,
    device: str,
    environment: Mapping[str, str],
    config: Config,
    parent: Path,
    digest: str,
) -> None:
    """A process's life: jobs come in, answers go out."""
    for number in (signal.SIGINT, *ASKING):
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent(signal.SIGKILL)
    os.environ |= environment
    log_to_stderr()
    try:
        for found in _served(connection, device, config, parent, digest):
            connection.send((found, None))
    except BrokenPipeError:
        return  # the parent has given up
    except Exception as error:
        code, message, is_expected = outcome_of(error)
        if not is_expected:
            logging.getLogger(__name__).error(traceback.format_exc())
        connection.send((None, (code, message)))


def _served(
    connection: Connection, device: str, config: Config, parent: Path, digest: str
) -> Iterator["int | Answered"]:
    from morebench.evaluation.asking import answering, ask
    from morebench.evaluation.sheets import open_sheets

    asked = ask(config, open_sheets(config))
    if asked.digest != digest:
        raise DataError("The tasks' records or images changed while they were read. Start again.")
    with answering(config, parent, device, asked) as here:
        yield here.cache_positions
        while True:
            try:
                job = connection.recv()
            except (EOFError, ConnectionResetError):  # the parent needs no more
                return
            yield here.answer(job)
