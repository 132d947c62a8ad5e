"""How far, how fast, how long: a bar on a terminal, a line a minute in a log."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0


class StepProgress:
    def __init__(self, label: str, num_steps: int, first_step: int) -> None:
        self._label = label
        self._num_steps = num_steps
        self._first_step = first_step
        self._done = first_step
        self._started = self._last_line = time.monotonic()
        self._text = ""
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._num_steps, completed=self._first_step, text=""
            )
        else:
            self._line(f"{self._num_steps - self._first_step} steps to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line(f"done in {self._elapsed()}, {self._text}")

    def update(self, done: int, loss: float, tokens_per_s: float) -> None:
        self._done = done
        self._text = f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self._text)
        elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            per_step = (now - self._started) / (done - self._first_step)
            left = timedelta(seconds=round(per_step * (self._num_steps - done)))
            self._line(f"{self._text}, {per_step:.2f} s/step, {left} left")

    def _elapsed(self) -> timedelta:
        return timedelta(seconds=round(time.monotonic() - self._started))

    def _line(self, text: str) -> None:
        print(f"{self._label} {self._done}/{self._num_steps}: {text}", file=sys.stderr, flush=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
