"""Errors a user can act on. The commands print them without a traceback and exit with their code."""

from collections.abc import Iterable

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


class WeightsError(MorebenchError):
    """Starting weights are missing or do not fit the shapes the config states."""

    exit_code = EXIT_USER


class RunError(MorebenchError):
    """A run cannot go on: its folder is not writable, locked or damaged, or the device too small for it."""

    exit_code = EXIT_USER


class NonFiniteError(MorebenchError):
    """The loss or the gradients became NaN or infinite."""

    exit_code = EXIT_NAN


class DiskFullError(MorebenchError):
    """Nothing more can be written; the last good checkpoint is kept."""

    exit_code = EXIT_DISK_FULL


class Interrupted(MorebenchError):
    """Asked to stop by a signal; the state was saved and the next start continues from it."""

    exit_code = EXIT_INTERRUPTED


def join_problems(problems: Iterable[str], limit: int = 20) -> str:
    """One line per problem, so that a user mends all of them at once; says how many were left out."""
    lines = list(problems)
    shown = lines[:limit]
    if len(lines) > limit:
        shown.append(f"... and {len(lines) - limit} more of this kind")
    return "\n".join(shown)
