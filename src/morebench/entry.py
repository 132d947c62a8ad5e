"""The commands' common door: help, overrides checked before anything starts, errors without tracebacks."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from morebench.config.compose import CONFIG_DIR_VARIABLE
from morebench.errors import EXIT_DONE, EXIT_USER, ConfigError, Interrupted, MorebenchError, join_problems


def fail(error: MorebenchError) -> NoReturn:
    """Print what went wrong and leave with the kind's exit code."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def run(
    command: Callable[[Sequence[str]], int | None], help_text: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command that takes overrides, and of Hydra's flags only --config-dir."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _take_config_dir(arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text.strip())
        raise SystemExit(EXIT_DONE)
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        print(
            join_problems(
                f"error: {flag}: this command takes KEY=VALUE, --config-dir DIR and --help" for flag in flags
            ),
            file=sys.stderr,
        )
        raise SystemExit(EXIT_USER)
    try:
        code = command(arguments)
    except MorebenchError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(Interrupted("interrupted."))
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        raise SystemExit(EXIT_DONE) from None
    raise SystemExit(code or EXIT_DONE)


def _take_config_dir(arguments: list[str]) -> None:
    for at, argument in enumerate(arguments):
        flag, _, folder = argument.partition("=")
        if flag not in ("--config-dir", "-cd"):
            continue
        given = [argument] if folder else arguments[at : at + 2]
        if not folder and len(given) == 1:
            fail(ConfigError(f"{flag}: expected a folder after it."))
        os.environ[CONFIG_DIR_VARIABLE] = str(Path(folder or given[-1]).resolve())
        del arguments[at : at + len(given)]
        return
