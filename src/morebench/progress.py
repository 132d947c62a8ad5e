"""How far, how fast, how long: a bar on a terminal, otherwise a line a minute."""

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0

Item = TypeVar("Item")


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield `items`, saying on stderr how many are done."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, description=label)
        return
    started = last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or number == len(items):
            last = now
            rate = number / max(now - started, 1e-9)
            left = timedelta(seconds=round((len(items) - number) / rate))
            print(f"{label} {number}/{len(items)}: {rate:.1f}/s, {left} left", file=sys.stderr, flush=True)
