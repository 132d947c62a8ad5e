"""`python -m morebench.track sync`: bring MLflow up to what the run folders hold."""

import sys
from collections.abc import Sequence
from pathlib import Path

from morebench.errors import EXIT_DONE, ConfigError

USAGE = "python -m morebench.track sync [tracking.uri=...] [paths.runs=...]"


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] != "sync":
        found = f"{arguments[0]!r}" if arguments else "nothing"
        raise ConfigError(f"expected the sub-verb sync, found {found}. Usage: {USAGE}")
    from morebench.config.compose import compose_config
    from morebench.matrix.mirror import sync

    config = compose_config(list(arguments[1:])).config
    synced = sync(Path(config.paths.runs), config.tracking)
    print(
        f"{synced.num_runs} runs: {synced.num_up_to_date} were up to date, "
        f"{synced.num_points} new metric values for the others."
    )
    if synced.unknown:
        print(f"Not a run folder of this version, left out: {', '.join(synced.unknown)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
