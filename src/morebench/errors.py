"""Errors a user can act on. The commands print them without a traceback and exit with their code."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILED = 1  # worth a retry
EXIT_USER = 2  # config, data or input: a retry would fail the same way
EXIT_NAN = 4
EXIT_DISK_FULL = 5
EXIT_INTERRUPTED = 75  # state is saved; start again to continue (EX_TEMPFAIL of sysexits.h)


class MorebenchError(Exception):
    """Says what was expected, what was found, where, and what would have been right."""

    exit_code = EXIT_FAILED


class ConfigError(MorebenchError):
    """The overrides or the files in conf/ and experiments/ do not make a valid cell."""

    exit_code = EXIT_USER


class DataError(MorebenchError):
    """A record, an image or a folder is not what its schema promises."""

    exit_code = EXIT_USER


class WorkerError(MorebenchError):
    """A process that reads training data was killed; the last good checkpoint is kept."""


class WeightsError(MorebenchError):
    """Starting weights are missing or do not fit the shapes the config states."""

    exit_code = EXIT_USER


class RunError(MorebenchError):
    """A run cannot go on: its folder is not writable, locked or damaged, or the device too small for it."""

    exit_code = EXIT_USER


class JudgeError(MorebenchError):
    """The model that reads what no rule can read is out of reach; what was generated is kept."""


class FencedError(RunError):
    """The run belongs to another process by now: this one must not write to its folder any more."""


class NonFiniteError(MorebenchError):
    """The loss or the gradients became NaN or infinite."""

    exit_code = EXIT_NAN


class DiskFullError(MorebenchError):
    """Nothing more can be written; the last good checkpoint is kept."""

    exit_code = EXIT_DISK_FULL


class RankError(MorebenchError):
    """One of the processes that train a run together ended badly; has the exit code of that rank."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(MorebenchError):
    """Asked to stop by a signal; the state was saved and the next start continues from it."""

    exit_code = EXIT_INTERRUPTED


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def outcome_of(error: Exception) -> tuple[int, str, bool]:
    """Exit code, message, and whether the message says all: otherwise the log needs a traceback."""
    if isinstance(error, MorebenchError):
        return error.exit_code, str(error), True
    code, number = EXIT_FAILED, getattr(error, "errno", None)
    if isinstance(error, OSError) and number in _FULL:
        code = EXIT_DISK_FULL
    elif isinstance(error, OSError) and number in _FORBIDDEN:
        code = EXIT_USER  # a retry would be refused too
    return code, f"{type(error).__name__}: {error}", False


@contextmanager
def resumable(*folders: Path) -> Iterator[None]:
    """For work that writes to `folders` and keeps finished parts: the same command goes on after these."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on from here.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            places = error.filename or " or ".join(map(str, folders))
            raise DiskFullError(f"no space left in {places}. Make room; the same command goes on.") from error
        raise RunError(f"{error.filename or folders[0]}: {error.strerror or error}.") from error


def join_problems(problems: Iterable[str], limit: int = 20) -> str:
    """One line per problem, so that a user mends all of them at once; says how many were left out."""
    lines = list(problems)
    shown = lines[:limit]
    if len(lines) > limit:
        shown.append(f"... and {len(lines) - limit} more of this kind")
    return "\n".join(shown)
