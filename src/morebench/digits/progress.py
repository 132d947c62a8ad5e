"""Progress on stderr: a bar on a terminal, else a line now and then."""

from collections.abc import Iterator
from sys import stderr
from time import monotonic

from rich.console import Console
from rich.progress import track

SECONDS_BETWEEN_LINES = 15.0


def count_up(total: int, label: str) -> Iterator[int]:
    if stderr.isatty():
        yield from track(
            range(total),
            description=label,
            console=Console(stderr=True),
            transient=True,
        )
        return
    last = monotonic()
    for number in range(total):
        yield number
        if monotonic() - last > SECONDS_BETWEEN_LINES:
            last = monotonic()
            print(f"{label}: {number + 1} of {total}", file=stderr, flush=True)
