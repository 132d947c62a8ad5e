"""What many processes of a cluster want at the same time is made by one of them; the others wait for it.

The lock only saves work: making twice is harmless, because what is made replaces files as a whole. No file
times and no flock, which lie on shared file systems: a maker counts in its lock, and one that stops counting
is dead.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

BEAT = 2.0  # seconds between two counts
PATIENCE = 90.0  # seconds; network file systems may show a file of a minute ago

Made = TypeVar("Made")


def once(path: Path, load: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """`load` gives what `make` has put at `path`, or None."""
    if (found := load()) is not None:
        return found
    with alone(path):
        return found if (found := load()) is not None else make()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other process does the same for `path`; waits for one that is at work."""
    lock = path.with_name(f"{path.name}.lock")
    seen, since = None, time.monotonic()
    while True:
        with _held(lock) as is_mine:
            if is_mine:
                yield
                return
        if seen is None:
            print(f"waiting for another process that is at work on {path}", file=sys.stderr, flush=True)
        if (now := _read(lock)) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE or _is_dead(seen):
            lock.unlink(missing_ok=True)
        time.sleep(BEAT / 4)


@contextmanager
def _held(lock: Path) -> Iterator[bool]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    token, done = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}", Event()
    try:
        file = lock.open("x")
    except FileExistsError:
        yield False
        return
    try:
        with file:
            file.write(f"{token} 0")
    except OSError:  # a full disk: an empty lock would be waited for
        lock.unlink(missing_ok=True)
        raise
    beating = Thread(target=_beat, args=(lock, token, done), daemon=True)
    beating.start()
    try:
        yield True
    finally:
        done.set()
        beating.join()
        if _read(lock).startswith(token):  # else somebody thought this process dead and holds it now
            lock.unlink(missing_ok=True)


def _beat(lock: Path, token: str, done: Event) -> None:
    aside, count = lock.with_name(f"{lock.name}.{token.split()[-1]}"), 1
    while not done.wait(BEAT):
        try:
            aside.write_text(f"{token} {count}")
            aside.replace(lock)
        except OSError:  # a full disk: the work itself will say so
            aside.unlink(missing_ok=True)
        count += 1


def _is_dead(content: str) -> bool:
    """Whether it is known at once: its process would be on this machine and is not."""
    host, pid, *_ = [*content.split(), "", ""]
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(lock: Path) -> str:
    try:
        return lock.read_text()
    except FileNotFoundError:
        return ""
