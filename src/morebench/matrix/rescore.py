"""Scores once more from the predictions of an evaluate run: no GPU, no model, no torch.

With the same config they are rewritten in place; another judge or profile is another run, with the
predictions copied.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from morebench.config.compose import ROOT, Composed, load_chat_format, load_config
from morebench.config.schema import Config, Step
from morebench.errors import ConfigError, DataError, RunError, join_problems
from morebench.evaluation.outcome import JUDGE, score, write_results
from morebench.evaluation.predictions import Line
from morebench.evaluation.rescoring import usable_predictions
from morebench.evaluation.sheets import Sheet, open_sheets
from morebench.evaluation.spent import speeds
from morebench.matrix import ledger
from morebench.matrix.cell import NUMERICS_VERSION, cell_of
from morebench.matrix.identity import identity
from morebench.matrix.mirror import Mirror, prepare
from morebench.matrix.plan import Plan, make_plan
from morebench.matrix.step import prepare_run, seal
from morebench.training.fence import Fence
from morebench.training.files import read_manifest, update_manifest
from morebench.training.git import git_state

_COPIED = ("predictions", JUDGE)  # folders of a run that a rescored one begins with
_CARRIED = ("seconds", "gpu_hours", "questions", "answering", "hardware", "versions", "lock_sha256", "git")


@dataclass(frozen=True)
class Predicted:
    """An evaluate run, finished or not. `parent`: id or folder of its finetune run."""

    folder: Path
    config: Config
    axes: dict[str, Any]
    parent: str


def predicted_by(text: str, runs: Path) -> list[Predicted]:
    """The evaluate run of this id or folder, or all evaluate runs of this finetune run. Raises RunError."""
    folder = next((path for path in (runs / text, Path(text)) if path.is_dir()), None)
    manifest = ledger.read_json(folder / "manifest.json") if folder is not None else None
    if folder is None or manifest is None:
        raise RunError(f"{text} is neither a run in {runs} nor a run's folder.")
    step = Step[manifest["step"]]
    if step is Step.evaluate:
        return [_predicted(folder)]
    found = [
        _predicted(path)
        for path in sorted(runs.iterdir())
        if (path / "predictions").is_dir() and _parent_folder(path) == folder.resolve()
    ]
    if step is not Step.finetune or not found:
        raise RunError(
            f"{folder.name} is a {step.name} run without an evaluate run in {runs}, so there is nothing to "
            "score again. Leave rescore=true out to generate."
        )
    return found


def rescore(composed: Composed, candidates: Sequence[Predicted]) -> Path:
    """Score the first of `candidates` that answers what is asked; returns the folder of the run it makes.

    Raises DataError for everything that would have to be generated again, RunError if a folder is in use.
    """
    config = composed.config
    sheets = open_sheets(config)
    in_place = [made for made in candidates if _is_same(config, sheets, made)]
    made, lines = _first_usable(config, sheets, in_place or candidates)
    if in_place:
        folder = made.folder
    else:
        plan = make_plan([cell_of(composed)])
        (planned,) = (run for run in plan.runs.values() if run.step is Step.evaluate)
        folder = planned.folder
        if folder.name != made.folder.name:
            _check_id(plan, made)
            prepare_run(planned)
    with ledger.locked(folder) as me:
        fence = partial(ledger.check_owner, folder, me)
        if folder.name != made.folder.name:
            _copy(made.folder, folder)
        (folder / ledger.DONE).unlink(missing_ok=True)  # it names files that are about to change
        _score(config, sheets, lines, made, folder, fence)
        seal(folder, fence)
    if config.tracking.uri is not None:
        prepare(config.tracking)
    mirror = Mirror(config.tracking, folder, _cell_name(made), Step.evaluate.name, config.experiments)
    mirror.start()
    mirror.close()
    return folder


def _cell_name(made: Predicted) -> str:
    return "-".join(str(value) for value in made.axes.values())


def _first_usable(
    config: Config, sheets: Sequence[Sheet], candidates: Sequence[Predicted]
) -> tuple[Predicted, list[list[Line]]]:
    errors = []
    for made in candidates:
        try:
            return made, usable_predictions(config, sheets, made.config, made.folder)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _score(
    config: Config,
    sheets: Sequence[Sheet],
    lines: Sequence[Sequence[Line]],
    made: Predicted,
    folder: Path,
    fence: Fence,
) -> None:
    profile = config.stage.evaluate.profile.name
    before = ledger.read_json(made.folder / "results.json") or {"flips": None}
    answering = read_manifest(folder).get("answering", {})
    scores = score(sheets, lines, config.stage.evaluate.profile, folder, fence, speeds(answering))
    fence()
    now = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "profile": profile, "git": git_state(ROOT)}
    earlier = read_manifest(folder).get("rescored", [])
    update_manifest(folder, {"profile": profile, "rescored": [*earlier, now]})
    write_results(folder, {**before, "profile": profile, **scores})


def _copy(source: Path, folder: Path) -> None:
    for name in _COPIED:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
    manifest = read_manifest(source)
    carried = {key: manifest[key] for key in _CARRIED if key in manifest}
    update_manifest(folder, {**carried, "rescored_from": source.name})


def _is_same(config: Config, sheets: Sequence[Sheet], made: Predicted) -> bool:
    """Whether the run that made the predictions is the one asked for, as far as evaluating goes.

    An id cannot say so where the weights are no longer here, or the code has changed since.
    """
    tasks = (ledger.read_json(made.folder / "results.json") or {}).get("tasks", {})
    then = {name: result.get("source", {}).get("content_hash") for name, result in tasks.items()}
    now = {sheet.task.name: sheet.task.source.content_hash for sheet in sheets}
    return then == now and _content(config) == _content(made.config)


def _content(config: Config) -> Any:
    profile = config.stage.evaluate.profile.name
    tasks = {
        name: (identity(task.code), task.max_new_tokens[profile]) for name, task in config.suite.tasks.items()
    }
    return identity(config.stage.evaluate), load_chat_format(config.llm.chat_format), tasks


def _check_id(plan: Plan, made: Predicted) -> None:
    """Another run's id is made of its weights' content; and it promises answers of this code."""
    if plan.missing_sources:
        raise DataError(
            "Scored like this it is another run, whose id needs what is not on this machine:\n"
            + join_problems(plan.missing_sources)
        )
    numerics = read_manifest(made.folder).get("numerics")
    if numerics != NUMERICS_VERSION:
        raise ConfigError(
            f"Scored like this it is another run, of numerics {NUMERICS_VERSION}; but {made.folder.name} was "
            f"answered under numerics {numerics or 'before 4'}. Leave rescore=true out to generate."
        )


def _predicted(folder: Path) -> Predicted:
    config, axes = load_config(folder / "config.yaml"), ledger.read_json(folder / "cell.json")
    return Predicted(folder.absolute(), config, axes, str(_parent_folder(folder)))


def _parent_folder(folder: Path) -> Path | None:
    parents = ledger.read_json(folder / "parents.json") or {}
    place = parents.get(Step.finetune.name)
    return None if place is None else (folder.parent / place).resolve()
