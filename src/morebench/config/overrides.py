"""Check overrides before Hydra runs: every mistake at once, each with the nearest right name."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from morebench.config.compose import (
    Override,
    compose_config,
    experiment_names,
    groups,
    not_plainly_right,
    options,
    parse_overrides,
)
from morebench.errors import ConfigError, join_problems

FROM_PARENT = ("llm.weights", "vision.weights", "vision.encoder")


def check(texts: Sequence[str], multirun: bool = True) -> None:
    """Raise one ConfigError that lists everything wrong with these overrides.

    Args:
        multirun: sweeps and experiments are allowed.
    """
    problems: list[str] = []
    chosen: list[str] = []  # group choices that are right: the keys below depend on them
    values: list[Override] = []
    for override in parse_overrides(texts):
        if override.problem:
            problems.append(override.problem)
        elif override.is_sweep and not multirun:
            problems.append(f"{override.text!r} names several cells. Add -m to run them all.")
        elif override.key == "experiments":
            problems.extend(_check_experiments(override, multirun))
        elif override.key in groups():
            wrong = [value for value in override.values if value not in options(override.key)]
            problems.extend(
                _unknown(f"{override.key}={value}", value, options(override.key)) for value in wrong
            )
            if not wrong:
                chosen.append(f"{override.key}={override.values[0]}")
        else:
            values.append(override)
    problems.extend(_check_values(values, chosen))
    problems.extend(_taken_from_parent(values))
    if problems:
        raise ConfigError(join_problems(problems))


def _taken_from_parent(overrides: Sequence[Override]) -> list[str]:
    if not any(override.key == "parent" and override.values != ("null",) for override in overrides):
        return []
    return [
        f"{override.text}: with parent=ID these weights are the parent's. Leave one of the two out."
        for override in overrides
        if any(f"{override.key}.".startswith(f"{taken}.") for taken in FROM_PARENT)
    ]


def _check_experiments(override: Override, multirun: bool) -> list[str]:
    if not multirun:
        return [f"An experiment is many cells: python -m morebench.train -m {override.text}"]
    known = experiment_names()
    return [_unknown(f"experiments={v}", v, known) for v in override.values if v not in known]


def _check_values(overrides: Sequence[Override], chosen: Sequence[str]) -> Iterable[str]:
    config = compose_config(list(chosen)).config  # also where nothing is set: a choice's file may be wrong
    for override in overrides:
        ours = not override.key.startswith("hydra.")
        if ours and (problem := _missing_key(config, override)):
            yield problem
            continue
        # composing takes a quarter of a second, and a sweep may name hundreds of seeds
        for value in not_plainly_right(config, override) if ours else override.values:
            try:
                compose_config([*chosen, f"{override.key}={value}"])
            except ConfigError as error:
                yield f"{override.key}={value}: {str(error).partition(': ')[2]}"


def _missing_key(config: Any, override: Override) -> str | None:
    node, path = config, override.key.split(".")
    for depth, name in enumerate(path):
        known = keys(node)
        if name not in known:
            parent = ".".join(path[:depth])
            return _unknown(override.text, name, known, prefix=f"{parent}." if parent else "")
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return None


def keys(node: Any) -> list[str]:
    if is_dataclass(node):
        return [field.name for field in fields(node)]
    return [str(key) for key in node] if isinstance(node, dict) else []


def _unknown(text: str, name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {prefix}{near[0]}?" if near else ""
    listing = f"Known: {', '.join(known)}." if known else f"{prefix.rstrip('.')} has no keys below it."
    return f"{text}: there is no {prefix}{name}. {hint or listing}"
