"""Replay files of measured scorer cases through our scorers, both profiles.

    python -m morebench.evaluate golden=DIR

Prints one line per file and exits with 1 on any mismatch. Cells are evaluated by
`python -m morebench.train [-m] stage=evaluate OVERRIDE ...`, which runs missing parents first.
"""

from collections.abc import Sequence
from pathlib import Path

from morebench import entry
from morebench.config.compose import parse_overrides
from morebench.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError

_SHOWN = 5  # differences printed per file


def command(overrides: Sequence[str]) -> int:
    from morebench.evaluation.golden import replay

    given = {override.key: override.values for override in parse_overrides(overrides)}
    if set(given) != {"golden"} or len(given["golden"]) != 1:
        raise ConfigError(f"expected golden=DIR, found {' '.join(overrides) or 'nothing'}. See --help.")
    folder = Path(given["golden"][0])
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no *.json files.")
    differ = False
    for path in paths:
        result = replay(path)
        differ |= bool(result.differences)
        print(f"{result.name}: {result.num_compared} compared, {len(result.differences)} differ")
        for line in result.differences[:_SHOWN]:
            print(f"  {line}")
    return EXIT_FAILED if differ else EXIT_DONE


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
