"""How far, how fast, how long: a bar on a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import rich.progress
from rich.console import Console
from rich.text import Text

SECONDS_BETWEEN_LINES = 60.0

Item = TypeVar("Item")


class Progress:
    """On stderr. `done` of `total` were there before it started, and do not count for the rate."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total = label, total
        self._first = self._done = done
        self._started = self._last_line = time.monotonic()
        self._text = ""
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, text="")
        else:
            self._line(f"{self._total - self._done} to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line(f"done in {timedelta(seconds=round(time.monotonic() - self._started))}")

    def update(self, done: int, text: str = "") -> None:
        self._done, self._text = done, text
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif (now := time.monotonic()) - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (done - self._first) / (now - self._started)
            left = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown"
            self._line(f"{rate:.3g}/s, {left} left")

    def _line(self, pace: str) -> None:
        text = f"{pace}, {self._text}" if self._text else pace
        print(f"{self._label} {self._done}/{self._total}: {text}", file=sys.stderr, flush=True)


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield `items`, saying how many are done."""
    with Progress(label, len(items)) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            progress.update(number)


class _Rate(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TextColumn("{task.fields[text]}"),
        rich.progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
