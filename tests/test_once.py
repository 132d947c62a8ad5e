"""Many processes, one maker: nobody makes it twice, a dead maker is replaced, a failed one too."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import pytest

from morebench.data import once as once_module
from morebench.data.once import _is_dead, once


def load(path: Path) -> Callable[[], str | None]:
    return lambda: path.read_text() if path.exists() else None


def slowly(path: Path, log: Path, text: str) -> Callable[[], str]:
    def make() -> str:
        with log.open("a") as file:
            file.write(f"{text}\n")
        time.sleep(0.3)
        path.write_text(text)
        return text

    return make


def _want(path: Path, log: Path, name: str, results: Path) -> None:
    (results / name).write_text(once(path, load(path), slowly(path, log, name)))


def test_one_makes_and_the_others_get_it(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    made, log = tmp_path / "cache" / "made", tmp_path / "log"
    context = get_context("fork")
    names = [str(number) for number in range(4)]
    processes = [context.Process(target=_want, args=(made, log, name, results)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    (maker,) = log.read_text().split()
    assert [(results / name).read_text() for name in names] == [maker] * 4
    assert list(made.parent.iterdir()) == [made]


def test_who_is_dead_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once_module, "PATIENCE", 0.2)
    monkeypatch.setattr(once_module, "BEAT", 0.04)
    (tmp_path / "made.lock").write_text("elsewhere 1 token 17")
    assert once(tmp_path / "made", lambda: None, lambda: "mine") == "mine"
    assert not list(tmp_path.iterdir())


def test_who_died_on_this_machine_is_known_to_be_dead(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_die_making, args=(tmp_path / "made",))
    process.start()
    process.join(30)
    assert (tmp_path / "made.lock").exists()
    assert _is_dead((tmp_path / "made.lock").read_text())
    assert once(tmp_path / "made", lambda: None, lambda: "mine") == "mine"
    assert not any(
        map(_is_dead, ["", f"{socket.gethostname()} {os.getpid()} t 0", "elsewhere 999999999 t 0"])
    )


def _die_making(path: Path) -> None:
    def die() -> str:
        while not path.with_name("made.lock").read_text():
            time.sleep(0.01)
        os._exit(1)

    once(path, lambda: None, die)


def test_who_is_slow_and_alive_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once_module, "PATIENCE", 0.2)
    monkeypatch.setattr(once_module, "BEAT", 0.02)
    made, log = tmp_path / "made", tmp_path / "log"
    make = slowly(made, log, "first")
    first = Thread(target=lambda: once(made, load(made), lambda: (time.sleep(0.6), make())[1]))
    first.start()
    while not (tmp_path / "made.lock").exists():
        time.sleep(0.01)
    assert once(made, load(made), slowly(made, log, "second")) == "first"
    first.join()
    assert log.read_text() == "first\n"


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_makes_nobody_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """The clock of this machine, and that of the file server."""
    monkeypatch.setattr(once_module, "PATIENCE", 0.3)
    monkeypatch.setattr(once_module, "BEAT", 0.02)
    made, log, lock = tmp_path / "made", tmp_path / "log", tmp_path / "made.lock"
    now = time.time

    def make() -> str:
        for jump in range(20):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump % 2 * days * 86400)
            with suppress(FileNotFoundError):
                os.utime(lock, (time.time(), time.time()))
            time.sleep(0.03)
        return slowly(made, log, "first")()

    first = Thread(target=lambda: once(made, load(made), make))
    first.start()
    while not lock.exists():
        time.sleep(0.01)
    assert once(made, load(made), slowly(made, log, "second")) == "first"
    first.join()
    assert log.read_text() == "first\n"


def test_who_fails_leaves_the_lock_to_others(tmp_path: Path) -> None:
    def fail() -> str:
        raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        once(tmp_path / "made", lambda: None, fail)
    assert once(tmp_path / "made", lambda: None, lambda: "mine") == "mine"


def test_a_holder_thought_dead_leaves_the_lock_of_the_next_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once_module, "BEAT", 10.0)
    lock = tmp_path / "made.lock"

    def make() -> str:
        lock.write_text("another 1")
        return "mine"

    assert once(tmp_path / "made", lambda: None, make) == "mine"
    assert lock.read_text() == "another 1"
