"""Run what a plan is missing on this machine: warm worker processes, one crash costs one step."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from morebench.config.schema import Trainer
from morebench.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from morebench.matrix import ledger, mirror
from morebench.matrix.ledger import State
from morebench.matrix.plan import Plan, PlannedRun
from morebench.matrix.progress import Display
from morebench.matrix.ranks import local_ranks
from morebench.matrix.step import execute, prepare_run
from morebench.processes import exit_text, leave_with_parent, log_to_stderr, signals_held, usable_cores

_POLL_S = 0.5  # how often the display is refreshed and runs of other processes are looked at
_HELD = -1  # instead of an exit code: another process runs it
_ELSEWHERE = "running in another process"
_GRACE_S = 60.0  # how long a worker may take to save its state when it is told to stop


@dataclass(frozen=True)
class Outcome:
    run: PlannedRun
    exit_code: int
    message: str


def launch_local(plan: Plan, n_jobs: int | None) -> list[Outcome]:
    """Run every missing step whose parents succeed; returns the outcome of all that were tried.

    A run that another process holds is waited for. Raises RunError before anything starts when a run folder
    cannot be written.
    """
    todo = plan.todo()
    if not todo:
        return []
    for run in todo:
        if run.state is not State.running:
            prepare_run(run)
    mirror.prepare(todo[0].cell.config.tracking)
    trainer = todo[0].cell.config.trainer
    return _Pool(todo, n_jobs or default_jobs(trainer), trainer.threads).run()


def default_jobs(trainer: Trainer) -> int:
    """Steps at a time: on CPU all cores, `threads` for each rank; on an accelerator one, with all devices."""
    if trainer.accelerator == "cpu" and trainer.threads:
        return max(1, usable_cores() // (trainer.threads * local_ranks(trainer)))
    return 1


class _Worker:
    def __init__(self, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: data-loading workers are its children.
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, threads))
        with signals_held(signal.SIGINT):
            self.process.start()
        theirs.close()
        self.run: PlannedRun | None = None

    def start(self, run: PlannedRun) -> None:
        self.run = run
        self.connection.send(str(run.folder))

    def stop(self) -> None:
        self.connection.close()  # an idle worker sees the end of its pipe and leaves
        self.process.join(_GRACE_S)
        if self.process.is_alive():
            self.process.kill()


class _Pool:
    def __init__(self, todo: list[PlannedRun], n_jobs: int, threads: int | None) -> None:
        self.waiting = list(todo)
        self.n_jobs, self.threads = min(n_jobs, len(todo)), threads
        self.workers: list[_Worker] = []
        self.outcomes: dict[str, Outcome] = {}
        self.stopping = False
        self.display = Display(todo)

    def run(self) -> list[Outcome]:
        with _stop_on_signals(self._stop), self.display:
            try:
                while self.waiting or any(worker.run for worker in self.workers):
                    self._start_ready()
                    self._collect()
                    self.display.refresh()
            finally:
                for worker in self.workers:
                    worker.stop()
        return list(self.outcomes.values())

    def _start_ready(self) -> None:
        for run in list(self.waiting):
            blocked = [self.outcomes[p] for p in run.parents.values() if p in self.outcomes]
            if failed := [outcome for outcome in blocked if outcome.exit_code != EXIT_DONE]:
                self.waiting.remove(run)
                self._end(run, failed[0].exit_code, f"not started: {failed[0].run.run_id} did not finish")
            elif self.stopping:
                self.waiting.remove(run)
                self._end(run, EXIT_INTERRUPTED, "not started: asked to stop")
            elif any(parent.run_id in run.parents.values() for parent in self._unfinished(run)):
                continue
            elif ledger.state(run.folder) is State.running:
                self.display.note(run, _ELSEWHERE)
            elif ledger.is_done(run.folder):  # another process finished it while we waited
                self.waiting.remove(run)
                self._end(run, EXIT_DONE, "")
            elif worker := self._idle_worker():
                self.waiting.remove(run)
                self.display.started(run)
                worker.start(run)

    def _unfinished(self, but: PlannedRun) -> list[PlannedRun]:
        running = [worker.run for worker in self.workers if worker.run]
        return [run for run in [*self.waiting, *running] if run is not but]

    def _idle_worker(self) -> _Worker | None:
        for worker in self.workers:
            if worker.run is None:
                return worker
        if len(self.workers) < self.n_jobs:
            self.workers.append(_Worker(self.threads))
            return self.workers[-1]
        return None

    def _collect(self) -> None:
        busy = [worker for worker in self.workers if worker.run]
        handles = [handle for worker in busy for handle in (worker.connection, worker.process.sentinel)]
        if not handles:  # everything waits for other processes
            time.sleep(_POLL_S)
            return
        ready = wait(handles, timeout=_POLL_S)
        for worker in busy:
            run = worker.run
            assert run is not None
            if worker.connection in ready:
                try:
                    code, message = worker.connection.recv()
                except (EOFError, OSError):
                    continue  # died: its sentinel says so
                worker.run = None
                if code == _HELD:  # the other of two launches at the same moment was faster
                    self.waiting.append(run)
                    self.display.note(run, _ELSEWHERE)
                else:
                    self._end(run, code, message)
            elif worker.process.sentinel in ready:
                self.workers.remove(worker)
                died = (
                    f"its process died ({exit_text(worker.process.exitcode)}); see {run.folder / 'log.txt'}"
                )
                # its watchdog ends a hung one with EXIT_INTERRUPTED
                is_resumable = self.stopping or worker.process.exitcode == EXIT_INTERRUPTED
                self._end(run, EXIT_INTERRUPTED if is_resumable else EXIT_FAILED, died)

    def _end(self, run: PlannedRun, code: int, message: str) -> None:
        self.outcomes[run.run_id] = Outcome(run, code, message)
        self.display.ended(run, code, message)

    def _stop(self) -> None:
        self.stopping = True
        for worker in self.workers:
            if worker.run and worker.process.is_alive():
                worker.process.terminate()


@contextmanager
def _stop_on_signals(stop: object) -> Iterator[None]:
    """Ctrl-C and TERM: tell the workers to save and leave; they are waited for."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()  # type: ignore[operator]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _work(connection: Connection, threads: int | None) -> None:
    """A worker's life: folders come in, exit codes go out; torch is imported once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which sends TERM
    if threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    leave_with_parent(signal.SIGTERM)  # with its state saved
    while True:
        try:
            folder = Path(connection.recv())
        except (EOFError, OSError):
            return
        with (folder / "log.txt").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        log_to_stderr()
        try:
            connection.send(execute(folder))
        except ledger.HeldError as error:
            connection.send((_HELD, str(error)))
