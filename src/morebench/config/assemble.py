"""Many cells fast: each choice of each axis is composed once, and cells are put together from the parts.

One Hydra compose takes a quarter of a second; a thousand cells of a study differ in a few dozen choices.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from morebench.config.compose import Composed, compose_config
from morebench.config.schema import AXES, Config
from morebench.errors import ConfigError

_Overrides = tuple[str, ...]  # of one axis: its choice, and values below it
_Node = tuple[str, Any]  # the choice, and its part of the config


def assemble(rows: Sequence[Sequence[str]]) -> list[Composed]:
    """Configs of override lists as `experiments.expand` gives them; equal to composing each row alone."""
    split = [_split(row) for row in rows]
    bases = {rest: compose_config(rest) for rest in dict.fromkeys(rest for _, rest, _ in split)}
    nodes = _nodes([dict.fromkeys(axes[axis] for axes, _, _ in split) for axis in AXES])
    cells = []
    for axes, rest, seed in split:
        base = bases[rest]
        parts = {axis: nodes[axis, overrides] for axis, overrides in axes.items()}
        config: Config = replace(base.config, **{axis: part for axis, (_, part) in parts.items()})
        if seed is not None:
            config = replace(config, seed=seed)
        cells.append(
            Composed({**base.choices, **{axis: choice for axis, (choice, _) in parts.items()}}, config)
        )
    return cells


def _split(row: Sequence[str]) -> tuple[dict[str, _Overrides], _Overrides, int | None]:
    """Overrides by axis, those that belong to none, and the seed."""
    values = dict(text.split("=", 1) for text in row)
    axes = {
        axis: tuple(text for text in row if text.split("=", 1)[0].split(".", 1)[0] == axis) for axis in AXES
    }
    taken = {"seed=" + values["seed"]} if "seed" in values else set()
    taken.update(text for texts in axes.values() for text in texts)
    rest = tuple(text for text in row if text not in taken)
    return axes, rest, int(values["seed"]) if "seed" in values else None


def _nodes(wanted: Sequence[Iterable[_Overrides]]) -> dict[tuple[str, _Overrides], _Node]:
    """By axis and overrides. Axes know nothing of each other, so that one compose gives a node of each."""
    nodes: dict[tuple[str, _Overrides], _Node] = {}
    for together in zip_longest(*wanted):
        asked = {
            axis: overrides for axis, overrides in zip(AXES, together, strict=True) if overrides is not None
        }
        try:
            composed = compose_config([text for overrides in asked.values() for text in overrides])
        except ConfigError:
            for overrides in asked.values():  # alone, so that the error names the axis it lies in
                compose_config(overrides)
            raise
        for axis, overrides in asked.items():
            nodes[axis, overrides] = composed.choices[axis], getattr(composed.config, axis)
    return nodes
