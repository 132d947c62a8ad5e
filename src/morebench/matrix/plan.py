"""What is there and what is missing. Never imports torch: a thousand cells are planned in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from morebench.config.compose import load_shape
from morebench.config.schema import Step
from morebench.config.visual import vision_problems
from morebench.errors import ConfigError, join_problems
from morebench.matrix import ledger
from morebench.matrix.cell import CHAIN, PARENT, Cell, run_ids
from morebench.matrix.ledger import State
from morebench.matrix.sources import Sources


@dataclass
class PlannedRun:
    """One step, executed once however many cells share it."""

    run_id: str
    step: Step
    cell: Cell  # the first cell that needs it; what it reads is the same for all of them
    folder: Path
    parents: dict[Step, str]  # step -> run id, the whole way up
    state: State
    shared_by: list[str] = field(default_factory=list)  # names of the cells


@dataclass(frozen=True)
class Plan:
    cells: Sequence[Cell]
    ids: Sequence[dict[Step, str]]  # per cell
    runs: dict[str, PlannedRun]  # run id -> run; parents before children
    missing_sources: Sequence[str]

    def todo(self) -> list[PlannedRun]:
        return [run for run in self.runs.values() if run.state is not State.done]


def make_plan(cells: Sequence[Cell]) -> Plan:
    """Raises one ConfigError for all cells whose vision encoder could not be built."""
    _check(cells)
    sources = Sources()
    ids = [run_ids(cell, sources) for cell in cells]
    runs: dict[str, PlannedRun] = {}
    for step in CHAIN:
        for cell, own in zip(cells, ids, strict=True):
            if step not in own:
                continue
            run_id = own[step]
            if run_id not in runs:
                folder = _folder(cell, run_id)
                runs[run_id] = PlannedRun(
                    run_id, step, cell, folder, _parents(own, step), ledger.state(folder)
                )
            runs[run_id].shared_by.append(cell.name)
    return Plan(cells, ids, runs, list(sources.missing))


def _check(cells: Sequence[Cell]) -> None:
    problems = [
        f"vision={cell.choices['vision']} resolution={cell.choices['resolution']}: {problem}"
        for cell in cells
        for problem in vision_problems(
            cell.config.vision, load_shape(cell.config.vision.shape), cell.config.resolution
        )
    ]
    if problems:
        raise ConfigError(join_problems(dict.fromkeys(problems)))


def _parents(own: dict[Step, str], step: Step) -> dict[Step, str]:
    parents = {}
    while step in PARENT and PARENT[step] in own:  # a chain may start after a run it was given
        step = PARENT[step]
        parents[step] = own[step]
    return parents


def _folder(cell: Cell, run_id: str) -> Path:
    if cell.parent is not None and cell.parent.run_id == run_id:
        return cell.parent.folder
    return Path(cell.config.paths.runs) / run_id
