"""Evaluate one finished finetune run, or replay what others measured through our scorers.

    python -m morebench.evaluate run=ID [suite=NAME] [stage.evaluate.profile=lmms_eval_0_7_3] ...
    python -m morebench.evaluate golden=DIR
    python -m morebench.evaluate outputs=FILE task=NAME [profile=lmms_eval_0_7_3] [paths.data=DIR] ...

run=ID: the run's own config says what the model is and, unless overridden, which suite it answers; what may
be overridden is suite, stage.evaluate, trainer, tracking, paths, unchecked_data, max_quarantined. Everything
else is `python -m morebench.train stage=evaluate parent=ID OVERRIDE ...`, and whole cells are evaluated by
`python -m morebench.train [-m] stage=evaluate OVERRIDE ...`, which runs missing parents first.

golden=DIR: our scorers, both profiles; prints one line per file and exits with 1 on any mismatch.

outputs=FILE: published outputs of every item of a task (lmms-eval's logged samples, LLaVA's answers file, or
lines of `id` and `prediction`); compares scores, and metrics of a results file beside it; exits with 1 on any
mismatch. docs/evaluation.md has the layouts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from morebench import entry
from morebench.config.compose import (
    Composed,
    Override,
    compose_config,
    override_config,
    parse_overrides,
)
from morebench.config.overrides import check
from morebench.config.schema import AXES, Step
from morebench.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError, join_problems

_SHOWN = 5  # differences printed per file
_MACHINE = (
    "paths",
    "trainer",
    "tracking",
    "unchecked_data",
    "max_quarantined",
)  # of this start, not of the one that trained
_OVERRIDABLE = ("suite", "stage.evaluate", *_MACHINE)


def command(arguments: Sequence[str]) -> int:
    parsed = parse_overrides(arguments)
    own = {
        override.key: override.values for override in parsed if override.key in ("golden", "run", "outputs")
    }
    if len(own) != 1 or any(len(values) != 1 for values in own.values()):
        found = " ".join(arguments) or "nothing"
        raise ConfigError(f"expected one of run=ID, golden=DIR or outputs=FILE, found {found}. See --help.")
    rest = [override for override in parsed if override.key not in own]
    if "run" in own:
        return _evaluate(own["run"][0], rest)
    if "outputs" in own:
        return _replay_outputs(Path(own["outputs"][0]), rest)
    if rest:
        raise ConfigError(join_problems(f"{override.text}: golden=DIR stands alone." for override in rest))
    return _replay(Path(own["golden"][0]))


def composed_for(run: str, overrides: Sequence[Override]) -> Composed:
    """The evaluate step of a finished run's cell, under `overrides`."""
    from morebench.matrix.parent import find_run

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
    machine = [override.text for override in overrides if override.key.split(".")[0] in _MACHINE]
    here = compose_config(machine)
    parent = find_run(run, Path(here.config.paths.runs))
    if parent.step is not Step.finetune:
        raise ConfigError(
            f"{parent.run_id} is a {parent.step.name} run. Only a finetune run can be evaluated."
        )
    config = replace(
        parent.config,
        **{key: getattr(here.config, key) for key in _MACHINE},
        parent=run,
        experiments=None,
        stage=replace(parent.config.stage, steps=[Step.evaluate]),
    )
    others = [override.text for override in overrides if override.text not in machine]
    choices = {**here.choices, **{axis: str(parent.axes[axis]) for axis in AXES}}
    return Composed(choices, override_config(config, others))


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{free}.") for free in _OVERRIDABLE)


def _evaluate(run: str, overrides: Sequence[Override]) -> int:
    from morebench.train import launch

    return launch([composed_for(run, overrides)], {})


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
