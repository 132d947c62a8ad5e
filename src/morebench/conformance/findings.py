"""One line of the report each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from morebench.errors import MorebenchError


class Verdict(Enum):
    ok = "ok"
    failed = "FAILED"
    skipped = "skipped"  # something it needs is not on this machine
    shown = ""  # a fact, neither right nor wrong


@dataclass(frozen=True)
class Finding:
    topic: str
    what: str
    found: str
    verdict: Verdict


def judged(topic: str, what: str, is_right: bool, found: str, expected: str = "") -> Finding:
    """`expected` says what would have been right, and is printed when it is not."""
    if is_right or not expected:
        return Finding(topic, what, found, Verdict.ok if is_right else Verdict.failed)
    return Finding(topic, what, f"{found}; expected {expected}", Verdict.failed)


def shown(topic: str, what: str, found: str) -> Finding:
    return Finding(topic, what, found, Verdict.shown)


def skipped(topic: str, what: str, why: str) -> Finding:
    return Finding(topic, what, why, Verdict.skipped)


def failed(topic: str, what: str, error: Exception) -> Finding:
    """An error that is none of ours says its kind: it comes out of somebody else's code."""
    text = str(error) if isinstance(error, MorebenchError) else f"{type(error).__name__}: {error}"
    return Finding(topic, what, text, Verdict.failed)


def until_error(topic: str, what: str, examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """All findings of `examine`, and the error it ends with. Any error: parts are foreign code."""
    try:
        yield from examine()
    except Exception as error:
        yield failed(topic, what, error)
