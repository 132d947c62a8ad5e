"""Whether this process may still commit: an older copy of a run that lived on must not."""

from collections.abc import Callable

# Called before every commit (checkpoint, parts, manifest, results). Raises FencedError when the run is
# somebody else's by now.
Fence = Callable[[], None]


def unfenced() -> None:
    """For a folder that nobody else knows of."""
