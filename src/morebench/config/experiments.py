"""Experiment files and command-line sweeps -> one list of overrides per cell."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from morebench.config.compose import EXPERIMENTS_DIR, Override, experiment_names, groups, parse_overrides
from morebench.config.schema import AXES
from morebench.errors import ConfigError, join_problems

Assignment = dict[str, str]  # key -> value, as on the command line
_KEYS = {"label", "pin", "blocks", "include"}


@dataclass(frozen=True)
class Experiment:
    """`experiments/<name>.yaml`: its cells in the file's order."""

    name: str
    label: str
    cells: tuple[Assignment, ...]


def load_experiment(name: str) -> Experiment:
    """Read and expand one file; raises ConfigError that names every problem in it."""
    path = EXPERIMENTS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"experiments/{name}.yaml does not exist. There are: {', '.join(experiment_names())}."
        )
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, dict):
        raise ConfigError(f"experiments/{name}.yaml: expected keys {sorted(_KEYS)}.")
    problems = [f"unknown key {key!r}; known: {sorted(_KEYS)}" for key in raw.keys() - _KEYS]
    cells: list[Assignment] = []
    for other in raw.get("include", []):
        cells.extend(load_experiment(other).cells)
    pin = {key: _text(value) for key, value in raw.get("pin", {}).items()}
    for number, block in enumerate(raw.get("blocks", [])):
        rows, wrong = _rows(block)
        problems.extend(f"block {number}: {problem}" for problem in wrong)
        cells.extend({**pin, **row} for row in rows)
    if not cells and not problems:
        problems.append("no cells: give `blocks:` (each a `grid:` or `cells:`) or `include:`")
    if problems:
        raise ConfigError(join_problems(f"experiments/{name}.yaml: {problem}" for problem in problems))
    return Experiment(name, str(raw.get("label", name)), tuple(_unique(cells)))


def _rows(block: Mapping[str, Any]) -> tuple[list[Assignment], list[str]]:
    if set(block) == {"grid"}:
        grid = {key: [_text(v) for v in _as_list(values)] for key, values in block["grid"].items()}
        rows = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    elif set(block) == {"cells"}:
        rows = [{key: _text(value) for key, value in row.items()} for row in block["cells"]]
    else:
        return [], [f"expected one of `grid:` or `cells:`, found {sorted(block)}"]
    # Every axis is named, so that a file means the same after a default changes.
    missing = {axis for row in rows for axis in AXES if axis not in row}
    return rows, [f"axis {axis!r} is not named" for axis in sorted(missing)]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Override lists of all cells: the union of the experiments, times the sweeps, duplicates removed.

    A row keeps the name of the (first) experiment it comes from as `experiments=NAME`.

    An override of an axis that an experiment lists narrows it (only cells with one of the named choices
    stay, and it is an error if none does); any other override multiplies or replaces.
    """
    parsed = parse_overrides(overrides)
    if problems := [override.problem for override in parsed if override.problem]:
        raise ConfigError(join_problems(problems))
    names = _experiment_names_in(parsed)
    rest = [override for override in parsed if override.key != "experiments"]
    if not names:
        return [_as_overrides(row) for row in _unique(_product(rest))]
    cells = _unique({**cell, "experiments": name} for name in names for cell in load_experiment(name).cells)
    narrowing = [override for override in rest if override.key in AXES]
    for override in narrowing:
        kept = [cell for cell in cells if cell[override.key] in override.values]
        if not kept:
            listed = sorted({cell[override.key] for cell in cells})
            raise ConfigError(
                f"{override.text}: no cell of {', '.join(names)} has it. Its {override.key} choices: "
                f"{', '.join(listed)}. To run another cell, leave `experiments` out."
            )
        cells = kept
    others = _product([override for override in rest if override not in narrowing])
    return [_as_overrides(row) for row in _unique({**cell, **extra} for cell in cells for extra in others)]


def _experiment_names_in(parsed: Iterable[Override]) -> list[str]:
    return [name for override in parsed if override.key == "experiments" for name in override.values]


def _product(overrides: Sequence[Override]) -> list[Assignment]:
    keys = [override.key for override in overrides]
    return [dict(zip(keys, row, strict=True)) for row in itertools.product(*(o.values for o in overrides))]


def _as_overrides(row: Assignment) -> list[str]:
    """Groups first: a value override must find its group chosen, whatever the order it was typed in."""
    chosen = groups()
    return [f"{key}={row[key]}" for key in sorted(row, key=lambda key: (key not in chosen, key))]


def _unique(rows: Iterable[Assignment]) -> list[Assignment]:
    """The first of equal rows; which experiment named a cell does not make it another one."""
    found: dict[frozenset[tuple[str, str]], Assignment] = {}
    for row in rows:
        found.setdefault(frozenset(item for item in row.items() if item[0] != "experiments"), row)
    return list(found.values())


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
