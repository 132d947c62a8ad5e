"""Evaluate one finished finetune run, or replay what others measured through our scorers.

    python -m morebench.evaluate run=ID [suite=NAME] [stage.evaluate.profile=lmms_eval_0_7_3] ...
    python -m morebench.evaluate run=ID rescore=true [suite.tasks.TASK.code.judge=static] ...
    python -m morebench.evaluate golden=DIR
    python -m morebench.evaluate outputs=FILE task=NAME [profile=lmms_eval_0_7_3] [paths.data=DIR] ...

run=ID: the run's own config says what the model is and, unless overridden, which suite it answers; what may
be overridden is suite, stage.evaluate, trainer, tracking, paths, unchecked_data, max_quarantined, download.
Everything else is `python -m morebench.train stage=evaluate parent=ID OVERRIDE ...`, and whole cells are
evaluated by `python -m morebench.train [-m] stage=evaluate OVERRIDE ...`, which runs missing parents first.

rescore=true: score the predictions of an evaluate run, or of a finetune run's, again, without a GPU or a
model. The same config: in place; another one is another run. What would have to be generated again is listed.

golden=DIR: our scorers, both profiles; prints one line per file and exits with 1 on any mismatch, with 2 if a
file is none of measured cases.

outputs=FILE: published outputs of every item of a task (lmms-eval's logged samples, LLaVA's answers file, or
lines of `id` and `prediction`); compares scores, and metrics of a results file beside it; exits with 1 on any
mismatch. docs/evaluation.md has the layouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from morebench import entry
from morebench.config.compose import (
    Composed,
    Override,
    compose_config,
    override_config,
    parse_overrides,
)
from morebench.config.overrides import check
from morebench.config.schema import AXES, Config, Step
from morebench.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, ConfigError, DataError, join_problems

_OWN = ("golden", "outputs", "run", "rescore")  # keys of this command alone
_SHOWN = 5  # differences printed per file
_MACHINE = (
    "paths",
    "trainer",
    "tracking",
    "unchecked_data",
    "max_quarantined",
    "download",
)  # of this start, not of the one that trained
_OVERRIDABLE = ("suite", "stage.evaluate", *_MACHINE)


def command(arguments: Sequence[str]) -> int:
    parsed = parse_overrides(arguments)
    own = {override.key: override.values for override in parsed if override.key in _OWN}
    if len(own.keys() - {"rescore"}) != 1 or any(len(values) != 1 for values in own.values()):
        found = " ".join(arguments) or "nothing"
        raise ConfigError(f"expected one of run=ID, golden=DIR or outputs=FILE, found {found}. See --help.")
    rest = [override for override in parsed if override.key not in own]
    again = own.get("rescore", ("false",))[0].lower()
    if again not in ("true", "false") or ("rescore" in own and "run" not in own):
        raise ConfigError(f"rescore={again}: expected run=ID rescore=true, or without it.")
    if "run" in own:
        evaluate = _rescore if again == "true" else _evaluate
        return evaluate(own["run"][0], rest)
    if "outputs" in own:
        return _replay_outputs(Path(own["outputs"][0]), rest)
    if rest:
        raise ConfigError(join_problems(f"{override.text}: golden=DIR stands alone." for override in rest))
    return _replay(Path(own["golden"][0]))


def composed_for(run: str, overrides: Sequence[Override]) -> Composed:
    """The evaluate step of a finished finetune run's cell, under `overrides`."""
    from morebench.matrix.parent import find_run

    here = _machine(overrides)
    parent = find_run(run, Path(here.config.paths.runs))
    if parent.step is not Step.finetune:
        raise ConfigError(
            f"{parent.run_id} is a {parent.step.name} run. Only a finetune run can be evaluated"
            + (", but its predictions scored again: rescore=true." if parent.step is Step.evaluate else ".")
        )
    return _composed(run, parent.config, parent.axes, here, overrides)


def _machine(overrides: Sequence[Override]) -> Composed:
    """Of this start. Raises one ConfigError for all overrides that are not free."""
    refused = [override for override in overrides if override.problem or not _may_change(override.key)]
    if refused:
        raise ConfigError(
            join_problems(
                override.problem
                or f"{override.text}: the run has it fixed. Free: {', '.join(_OVERRIDABLE)}. For others: "
                "python -m morebench.train stage=evaluate parent=ID OVERRIDE ..."
                for override in overrides
                if override in refused
            )
        )
    check([override.text for override in overrides if override.key in ("suite", *_MACHINE)], multirun=False)
    return compose_config([override.text for override in overrides if _is_machine(override)])


def _composed(
    parent: str, made: Config, axes: Mapping[str, Any], here: Composed, overrides: Sequence[Override]
) -> Composed:
    """`made`, which a finished run has, on this machine and under the other overrides."""
    config = replace(
        made,
        **{key: getattr(here.config, key) for key in _MACHINE},
        parent=parent,
        experiments=None,
        stage=replace(made.stage, steps=[Step.evaluate]),
    )
    others = [override.text for override in overrides if not _is_machine(override)]
    choices = {**here.choices, **{axis: str(axes[axis]) for axis in AXES}}
    return Composed(choices, override_config(config, others))


def _is_machine(override: Override) -> bool:
    return override.key.split(".")[0] in _MACHINE


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{free}.") for free in _OVERRIDABLE)


def _evaluate(run: str, overrides: Sequence[Override]) -> int:
    from morebench.matrix.cell import cells_of
    from morebench.matrix.plan import make_plan
    from morebench.train import launch

    composed = [composed_for(run, overrides)]
    code = launch(composed, {})
    if code == EXIT_DONE:
        (done,) = (one for one in make_plan(cells_of(composed)).runs.values() if one.step is Step.evaluate)
        _show(done.folder)
    return code


def _rescore(run: str, overrides: Sequence[Override]) -> int:
    from morebench.matrix.rescore import predicted_by, rescore

    here = _machine(overrides)
    candidates = predicted_by(run, Path(here.config.paths.runs))
    first = candidates[0]
    if first.folder.name == Path(run).name:  # an evaluate run: its suite and recipe, too, unless overridden
        composed = _composed(first.parent, first.config, first.axes, here, overrides)
    else:
        composed = composed_for(run, overrides)
    _show(rescore(composed, candidates))
    return EXIT_DONE


def _show(folder: Path) -> None:
    from rich.console import Console

    from morebench.reporting.scores import print_scores

    print_scores(folder, Console())


def _replay_outputs(path: Path, overrides: Sequence[Override]) -> int:
    from morebench.show_replay import show_replay

    tasks = [override.values[0] for override in overrides if override.key == "task"]
    if len(tasks) != 1:
        raise ConfigError("outputs=FILE: say once whose they are: task=NAME, e.g. task=gqa.")
    rest = [override for override in overrides if override.key != "task"]
    short = [
        f"stage.evaluate.{override.text}" if override.key == "profile" else override.text for override in rest
    ]
    return show_replay(path, tasks[0], short)


def _replay(folder: Path) -> int:
    from morebench.evaluation.golden import replay

    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no *.json files.")
    differ = unread = False
    for path in paths:
        try:
            result = replay(path)
        except DataError as error:
            unread = True
            print(error)
            continue
        differ |= bool(result.differences)
        left_out = len(result.not_compared)
        print(
            f"{result.name}: {result.num_compared} compared, {len(result.differences)} differ, "
            f"{left_out} keys not compared{': ' if left_out else ''}{', '.join(result.not_compared)}"
        )
        for line in result.differences[:_SHOWN]:
            print(f"  {line}")
    return EXIT_FAILED if differ else EXIT_USER if unread else EXIT_DONE


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
