"""Bring a published checkpoint in as a run, or take a run out as a transformers checkpoint.

    python -m morebench.convert from=reference path=DIR llm=llama31_8b vision=siglip [resolution=s2]
    python -m morebench.convert to=transformers run=ID out=DIR

from=reference reads checkpoints in the layout of LLaVA-1.5 and LLaVA-MORE: config.json (model_type
llava_llama, llava_phi or llava_gemma) with model.safetensors or pytorch_model.bin, whole or in shards, and
the tokenizer; or config.json with mm_projector.safetensors or mm_projector.bin of a pretrain step alone.
Pickles are opened for their tensors only; one that holds anything else is refused.

The overrides say which cell the checkpoint is: llm and vision always, any other key where the checkpoint
differs from the defaults, e.g. pretrain_data=recap or stage.finetune.max_length=2048. They are compared with
config.json and with every tensor's name and shape; every contradiction is printed, and nothing is written.

A whole model becomes a finished finetune run, a projector a finished pretrain run, below paths.runs. A
finetune run has its LLM, tokenizer and, if the checkpoint stores one, vision tower inside, in the published
dtype. The id of the run is printed. Go on with

    python -m morebench.evaluate run=ID
    python -m morebench.train stage=finetune parent=ID llm=... vision=...

Converting the same files twice finds the first run and does nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from morebench import entry
from morebench.config.compose import Override, compose_config, parse_overrides
from morebench.config.overrides import check
from morebench.errors import ConfigError, join_problems

_OWN = ("from", "path", "to", "run", "out")  # keys of this command; the others are the cell's
_USAGE = "from=reference path=DIR llm=... vision=..., or to=transformers run=ID out=DIR. See --help."


def command(arguments: Sequence[str]) -> None:
    parsed = parse_overrides(arguments)
    own = {override.key: override for override in parsed if override.key in _OWN}
    rest = [override for override in parsed if override.key not in _OWN]
    direction = {key: own[key].values for key in ("from", "to") if key in own}
    if direction == {"from": ("reference",)}:
        _from_reference(own, rest)
    elif direction == {"to": ("transformers",)}:
        _to_transformers(own, rest)
    else:
        raise ConfigError(f"expected {_USAGE} Found {' '.join(arguments) or 'nothing'}.")


def _from_reference(own: dict[str, Override], rest: Sequence[Override]) -> None:
    problems = _unexpected(own, {"from", "path"})
    given = {override.key for override in rest}
    problems += [
        f"{axis}=... is missing: nothing is guessed from names. Say which {axis} the checkpoint has."
        for axis in ("llm", "vision")
        if axis not in given
    ]
    problems += [
        f"{override.text}: an import makes the step that the checkpoint holds, from nothing else."
        for override in rest
        if override.key in ("stage", "stage.steps", "parent")
    ]
    if problems:
        raise ConfigError(join_problems(problems))
    texts = [override.text for override in rest]
    check(texts, multirun=False)
    composed = compose_config(texts)

    from transformers.utils import logging

    from morebench.matrix.imported import import_reference
    from morebench.prepare import check_writable

    logging.set_verbosity_error()  # its advice is about shapes that are compared here anyway
    logging.disable_progress_bar()
    check_writable(Path(composed.config.paths.runs))
    imported = import_reference(composed, Path(own["path"].values[0]).expanduser())
    for part, count in imported.report["taken"].items():
        print(f"{part}: {count} tensors", file=sys.stderr)
    for reason, count in imported.report["ignored"].items():
        print(f"left out: {count} tensors ({reason})", file=sys.stderr)
    print(f"{'written' if imported.is_new else 'was here already'}: {imported.folder}", file=sys.stderr)
    print(imported.folder.name)


def _to_transformers(own: dict[str, Override], rest: Sequence[Override]) -> None:
    problems = _unexpected(own, {"to", "run", "out"})
    problems += [f"{override.text}: unknown here." for override in rest if not _is_place(override)]
    if problems:
        raise ConfigError(join_problems(problems))
    texts = [override.text for override in rest]
    check(texts, multirun=False)

    from transformers.utils import logging

    from morebench.matrix.parent import find_run
    from morebench.models.transformers_export import export
    from morebench.training.files import disk_full_named

    run = find_run(own["run"].values[0], Path(compose_config(texts).config.paths.runs))
    logging.set_verbosity_error()  # it would list the blocks behind the features, which are not built
    logging.disable_progress_bar()
    out = Path(own["out"].values[0]).expanduser()
    with disk_full_named(out):
        export(run.folder, out)
    print(f"written: {out}, see its README.md", file=sys.stderr)


def _unexpected(own: dict[str, Override], wanted: set[str]) -> list[str]:
    problems = [
        f"{override.text}: does not go with {_USAGE}" for key, override in own.items() if key not in wanted
    ]
    problems += [f"{key}=... is missing. Expected {_USAGE}" for key in sorted(wanted - own.keys())]
    return problems + [
        f"{override.text}: expected one value."
        for override in own.values()
        if len(override.values) != 1 or override.values[0] in ("", "''")
    ]


def _is_place(override: Override) -> bool:
    return override.key.split(".")[0] == "paths"


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
