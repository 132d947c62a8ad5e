"""A cell is its content: run ids from everything that can change the weights, and from nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench.config.compose import Composed, load_chat_format, load_shape
from morebench.config.schema import AXES, Config, Features, Paths, Profile, Step, Suite
from morebench.errors import ConfigError, join_problems
from morebench.matrix.identity import digest, identity
from morebench.matrix.once_each import OnceEach
from morebench.matrix.parent import Parent, find_run, start_from
from morebench.matrix.sources import Sources

# Raise when a change of the code changes losses, predictions or the order of samples: every run id changes
# with it. Add a line to CHANGELOG.md that says why.
NUMERICS_VERSION = 4

CHAIN = (Step.pretrain, Step.finetune, Step.evaluate)
PARENT = {Step.finetune: Step.pretrain, Step.evaluate: Step.finetune}


@dataclass(frozen=True)
class Cell:
    """One choice per axis plus a seed."""

    choices: Mapping[str, str]  # axis -> file stem
    config: Config
    parent: Parent | None = None  # the run that stands for the chain's steps up to its own

    @property
    def axes(self) -> dict[str, Any]:
        """What a table prints about the cell; cell.json of its run folders."""
        return {**{axis: self.choices[axis] for axis in AXES}, "seed": self.config.seed}

    @property
    def name(self) -> str:
        return "-".join([*(self.choices[axis] for axis in AXES), f"s{self.config.seed}"])

    @property
    def steps(self) -> tuple[Step, ...]:
        """The chain up to the last requested step: a missing parent runs first."""
        first = 0 if self.parent is None else CHAIN.index(self.parent.step) + 1
        last = max(CHAIN.index(step) for step in self.config.stage.steps)
        return CHAIN[first : last + 1]


def cell_of(composed: Composed) -> Cell:
    """Raises RunError for a `parent` that is no finished run, ConfigError for one that does not fit."""
    choices, config = composed.choices, composed.config
    if config.parent is None:
        return Cell(choices, config)
    parent = find_run(config.parent, Path(config.paths.runs))
    return Cell(choices, start_from(parent, choices, config), parent)


def cells_of(composed: Sequence[Composed]) -> list[Cell]:
    """All cells, or one ConfigError for all whose `parent` does not fit."""
    cells, problems = [], []
    for one in composed:
        try:
            cells.append(cell_of(one))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems))
    return cells


def run_ids(cell: Cell, sources: Sources, once: OnceEach | None = None) -> dict[Step, str]:
    """Run id of every step of the cell's chain, parents included in their children's digest.

    A cell with a `parent` has that run's id in place of the steps up to its own. once: shared by many cells.
    """
    config, once = cell.config, once or OnceEach()
    parts = {
        "numerics": NUMERICS_VERSION,
        "llm": {
            **once(_part, config.llm, sources, config.paths),
            "chat_format": None,
        },  # the recipes below name it
        "vision": once(_part, config.vision, sources, config.paths),
        "resolution": once(identity, config.resolution),
        "projector": once(identity, config.projector),
        "seed": config.seed,
    }
    ids = {} if cell.parent is None else {cell.parent.step: cell.parent.run_id}
    for step in cell.steps:
        content = {
            **parts,
            "parent": ids.get(PARENT[step]) if step in PARENT else None,
            **_own(cell, step, sources, once),
        }
        ids[step] = f"{cell.name}.{step.name}.{digest(content)}"
    return ids


def _part(part: Any, sources: Sources, paths: Paths) -> dict[str, Any]:
    return {
        **identity(part),
        "weights": sources.weights(part.weights, paths),
        "shape": load_shape(part.shape),
    }


def _own(cell: Cell, step: Step, sources: Sources, once: OnceEach) -> dict[str, Any]:
    config = cell.config
    if step is Step.evaluate:
        return {
            "recipe": once(identity, config.stage.evaluate),
            "chat": once(load_chat_format, config.llm.chat_format),
            "tasks": once(_tasks, config.suite, config.stage.evaluate.profile, sources, config.paths),
        }
    recipe = config.stage.pretrain if step is Step.pretrain else config.stage.finetune
    return {
        "recipe": once(identity, recipe),
        "chat": once(load_chat_format, recipe.chat_format or config.llm.chat_format),
        "data": data_of(cell, step, sources),
        # computed and cached features are the same, and so are the ids of their runs
        **({"features": "8bit"} if config.features is Features.cached_8bit else {}),
    }


def _tasks(suite: Suite, profile: Profile, sources: Sources, paths: Paths) -> dict[str, Any]:
    return {
        name: {
            "code": task.code,
            "max_new_tokens": task.max_new_tokens[profile.name],
            "data": sources.task(name, task.data, paths),
        }
        for name, task in suite.tasks.items()
    }


def data_of(cell: Cell, step: Step, sources: Sources) -> str:
    """Content hash of what a train step reads."""
    group = f"{step.name}_data"
    return sources.data(group, cell.choices.get(group, "..."), cell.config)
