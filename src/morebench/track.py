"""Bring MLflow up to what the run folders hold; what is there already is not sent again.

python -m morebench.track sync
python -m morebench.track sync tracking.uri=http://tracker:5000
"""

from collections.abc import Sequence
from pathlib import Path

from morebench import entry
from morebench.errors import ConfigError


def command(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] != "sync":
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(f"expected `sync`, found {found}. Type: python -m morebench.track sync")
    from morebench.config.compose import compose_config
    from morebench.config.overrides import check
    from morebench.matrix.mirror import sync

    check(arguments[1:], multirun=False)
    config = compose_config(arguments[1:]).config
    synced = sync(Path(config.paths.runs), config.tracking)
    print(
        f"{synced.num_runs} runs: {synced.num_up_to_date} were up to date, "
        f"{synced.num_points} new metric values for the others."
    )
    if synced.unknown:
        print(f"Left out, because no step of this version ran there: {', '.join(synced.unknown)}")


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
