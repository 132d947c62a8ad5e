"""A finished run that a cell starts from instead of its own previous step (`parent=ID`)."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morebench.config.compose import load_chat_format, load_config, load_shape
from morebench.config.schema import AXES, Config, Part, Step
from morebench.errors import ConfigError, RunError, join_problems
from morebench.matrix import ledger
from morebench.matrix.identity import digest, identity

_CHAIN = tuple(Step)


@dataclass(frozen=True)
class Parent:
    run_id: str
    step: Step
    folder: Path
    axes: Mapping[str, Any]  # cell.json: axis -> choice, seed
    config: Config


def find_run(text: str, runs: Path) -> Parent:
    """The finished run with this id below `runs`, or in this folder. Raises RunError."""
    folder = next((path for path in (runs / text, Path(text)) if path.is_dir()), None)
    if folder is None:
        known = sorted(path.name for path in runs.glob("*") if (path / "cell.json").is_file())
        near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise RunError(f"{text} is neither a run in {runs} nor a folder. {len(known)} runs are there.{hint}")
    manifest, axes = (ledger.read_json(folder / name) for name in ("manifest.json", "cell.json"))
    if manifest is None or axes is None:
        raise RunError(f"{folder} is no run folder: it has no manifest.json with a cell.json.")
    if not ledger.is_done(folder):
        raise RunError(f"{folder} is {ledger.state(folder).name}. Only a finished run can be started from.")
    config = load_config(folder / "config.yaml")
    return Parent(manifest["run_id"], Step[manifest["step"]], folder.absolute(), axes, config)


def start_from(parent: Parent, choices: Mapping[str, str], config: Config) -> Config:
    """The cell's config with the weights that the parent was made with.

    `llm.weights`, `vision.weights` and `vision.encoder` are the parent's: an imported run brings its own.
    Raises one ConfigError for everything in which the two cells contradict each other.
    """
    problems = [*_wrong_steps(parent, config), *_contradictions(parent, choices, config)]
    if problems:
        raise ConfigError(join_problems(f"parent={parent.run_id}: {problem}" for problem in problems))
    vision, llm = parent.config.vision, parent.config.llm
    return replace(
        config,
        llm=replace(config.llm, weights=llm.weights),
        vision=replace(config.vision, weights=vision.weights, encoder=vision.encoder),
    )


def _wrong_steps(parent: Parent, config: Config) -> Iterator[str]:
    after = [step.name for step in _CHAIN[_CHAIN.index(parent.step) + 1 :]]
    if not after:
        yield "nothing comes after an evaluate step. Name a pretrain or a finetune run."
    elif early := [step.name for step in config.stage.steps if step.name not in after]:
        right = " or ".join(f"stage={name}" for name in after)
        yield f"it is a {parent.step.name} run, so {', '.join(early)} cannot follow. Choose {right}."


def _contradictions(parent: Parent, choices: Mapping[str, str], config: Config) -> Iterator[str]:
    # a table would name the child after the wrong one, even where shapes agree
    other = [axis for axis in AXES if choices[axis] != parent.axes[axis]]
    yield from (
        f"its cell has {axis}={parent.axes[axis]}, this one {axis}={choices[axis]}." for axis in other
    )
    theirs, ours = _facts(parent.config, parent.step), _facts(config, parent.step)
    for key in theirs | ours:
        said = key.split(".")[0] in other or (key == "chat format" and "llm" in other)
        if not said and theirs.get(key) != ours.get(key):
            yield f"its {key} is {theirs.get(key)}, this cell's {ours.get(key)}."


def _facts(config: Config, step: Step) -> dict[str, Any]:
    """What fixes the shapes and the meaning of saved parts."""
    facts = {
        **{f"llm.shape {key}": value for key, value in load_shape(config.llm.shape).items()},
        **{f"vision.shape {key}": value for key, value in load_shape(config.vision.shape).items()},
        "llm.visual_scale": config.llm.visual_scale.name,
        "vision.feature_layer": config.vision.feature_layer,
        **{f"vision.image.{key}": value for key, value in identity(config.vision.image).items()},
        "resolution.scales": sorted(config.resolution.scales),
        "projector.depth": config.projector.depth,
    }
    if step is Step.finetune:  # says which parts are read from the run
        trained = {Part.projector, *config.stage.finetune.trainable}
        facts["stage.finetune.trainable"] = sorted(part.name for part in trained)
        facts["chat format"] = _chat(config)
    return facts


def _chat(config: Config) -> str:
    """What a model was finetuned in is what it must be asked in."""
    chat = load_chat_format(config.stage.finetune.chat_format or config.llm.chat_format)
    return f"{chat.get('label')} ({digest(chat)[:6]})"
