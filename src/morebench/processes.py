"""What processes that share a machine ask of it, and owe each other."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait


def usable_cores() -> int:
    """That this process may use: a cluster gives a job some of a machine's."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def leave_with_parent(number: signal.Signals) -> None:
    """Called in a child: a parent that was killed cannot stop its children, so they signal themselves."""
    threading.Thread(target=_watch, args=(number,), daemon=True).start()


def start_pool_process() -> None:
    """Initializer of a pool: the parent alone acts on Ctrl-C, and takes its processes with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent(signal.SIGKILL)


def log_to_stderr() -> None:
    """As it is now: to be called again when it changes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def exit_text(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until afterwards: a process that is started meanwhile never sees it, not even early on."""
    with signals_held(signal.SIGINT):
        yield


@contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[None]:
    """They wait until afterwards; in a process that is started meanwhile until it lets them through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(number: signal.Signals) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), number)
