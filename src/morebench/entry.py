"""The commands' common door: help, overrides checked before anything starts, errors without tracebacks."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from morebench.errors import EXIT_DONE, EXIT_USER, MorebenchError, join_problems


def fail(error: MorebenchError) -> NoReturn:
    """Print what went wrong and leave with the kind's exit code."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def run(
    command: Callable[[Sequence[str]], int | None], help_text: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command that takes overrides only (no Hydra flags)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(help_text.strip())
        raise SystemExit(EXIT_DONE)
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        print(
            join_problems(f"error: {flag}: this command takes KEY=VALUE and --help only" for flag in flags),
            file=sys.stderr,
        )
        raise SystemExit(EXIT_USER)
    try:
        code = command(arguments)
    except MorebenchError as error:
        fail(error)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        raise SystemExit(EXIT_DONE) from None
    raise SystemExit(code or EXIT_DONE)
