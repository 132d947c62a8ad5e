"""What is there and what is missing. Never imports torch: a thousand cells are planned in seconds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from morebench.config.compose import load_chat_format, load_shape
from morebench.config.llm_shape import llm_problems
from morebench.config.schema import LLM, Resolution, Stage, Step, Vision
from morebench.config.visual import num_visual_tokens, vision_problems
from morebench.data.chat import ChatFormat
from morebench.data.checked import DataState
from morebench.errors import ConfigError, join_problems
from morebench.matrix import ledger
from morebench.matrix.cell import CHAIN, PARENT, Cell, data_of, run_ids
from morebench.matrix.ledger import State
from morebench.matrix.once_each import OnceEach
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
    data_hash: str | None  # content that a train step's id was made of
    shared_by: list[str] = field(default_factory=list)  # names of the cells


@dataclass(frozen=True)
class Plan:
    cells: Sequence[Cell]
    ids: Sequence[dict[Step, str]]  # per cell
    runs: dict[str, PlannedRun]  # run id -> run; parents before children
    missing_sources: Sequence[str]
    unusable_data: Sequence[str]  # sentences: why it should not be trained on
    data: Sequence[DataState]  # training data that some step of the plan reads

    def todo(self) -> list[PlannedRun]:
        return [run for run in self.runs.values() if run.state is not State.done]


def make_plan(cells: Sequence[Cell]) -> Plan:
    """Raises one ConfigError for all cells that could never run."""
    check_cells(cells)
    sources = Sources()
    once = OnceEach()
    ids = [run_ids(cell, sources, once) for cell in cells]
    runs: dict[str, PlannedRun] = {}
    for step in CHAIN:
        for cell, own in zip(cells, ids, strict=True):
            if step not in own:
                continue
            run_id = own[step]
            if run_id not in runs:
                folder = _folder(cell, run_id)
                trains = step is not Step.evaluate and step in cell.steps  # a given parent is trained
                data_hash = data_of(cell, step, sources) if trains else None
                parents, state = _parents(own, step), ledger.state(folder)
                runs[run_id] = PlannedRun(run_id, step, cell, folder, parents, state, data_hash)
            runs[run_id].shared_by.append(cell.name)
    return Plan(
        cells, ids, runs, list(sources.missing), list(sources.unusable), list(sources.data_states.values())
    )


def check_cells(cells: Sequence[Cell]) -> None:
    """Raises one ConfigError for everything that no weights or data could make right."""
    once = OnceEach()
    problems = (
        f"{' '.join(f'{axis}={cell.choices[axis]}' for axis in axes)}: {problem}"
        for cell in cells
        for axes, problem in once(
            _problems, cell.config.llm, cell.config.vision, cell.config.resolution, cell.config.stage
        )
    )
    if distinct := dict.fromkeys(problems):
        raise ConfigError(join_problems(distinct))


def _problems(
    llm: LLM, vision: Vision, resolution: Resolution, stage: Stage
) -> list[tuple[tuple[str, ...], str]]:
    """What is wrong, and the axes that it lies in."""
    return list(_find_problems(llm, vision, resolution, stage))


def _find_problems(
    llm: LLM, vision: Vision, resolution: Resolution, stage: Stage
) -> Iterator[tuple[tuple[str, ...], str]]:
    shape = load_shape(vision.shape)
    for problem in llm_problems(load_shape(llm.shape)):
        yield ("llm",), problem
    for problem in vision_problems(vision, shape, resolution):
        yield ("vision", "resolution"), problem
    try:
        tokens = num_visual_tokens(shape)
    except (KeyError, TypeError, ZeroDivisionError):  # said above
        tokens = 0
    for step, recipe in ((Step.pretrain, stage.pretrain), (Step.finetune, stage.finetune)):
        if recipe.max_length <= tokens:
            room = f"leaves no room for a text beside the {tokens} visual tokens"
            yield ("vision",), f"stage.{step.name}.max_length={recipe.max_length} {room}."
        try:
            ChatFormat.from_dict(load_chat_format(recipe.chat_format or llm.chat_format))
        except ConfigError as error:
            yield ("llm",), str(error)


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
