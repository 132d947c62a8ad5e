"""A published checkpoint becomes a run: the folder that training would have left, marked as imported."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from morebench.config.compose import ROOT, Composed, load_shape, save_config
from morebench.config.schema import LLM, Config, Part, Step, Weights
from morebench.errors import MorebenchError, WeightsError, join_problems
from morebench.matrix import ledger
from morebench.matrix.cell import Cell
from morebench.matrix.identity import digest, identity
from morebench.models.llm import llm_config, load_tokenizer
from morebench.models.parts import save_tensors
from morebench.models.reference_checkpoint import Dealt, deal
from morebench.models.reference_config import config_problems, llm_fields
from morebench.models.reference_files import CheckpointFiles, find_files, map_tensors
from morebench.models.weights import absence, locate
from morebench.training.files import disk_full_named, sha256, update_manifest
from morebench.training.provenance import provenance

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Imported:
    folder: Path
    report: Mapping[str, Any]  # tensors taken and ignored
    is_new: bool


def import_reference(composed: Composed, source: Path) -> Imported:
    """Write `source` as a finished run of the cell, or find the run that an earlier import wrote.

    A whole model becomes a finetune run that starts from nothing outside of its folder; a projector becomes a
    pretrain run. Weights keep the dtype they were published in. Raises one WeightsError for everything in
    which checkpoint and cell differ; nothing is written then.
    """
    files = find_files(source)
    config = replace(composed.config, stage=replace(composed.config.stage, steps=[files.step]))
    try:
        problems = config_problems(files.config, config, files.step)
        dealt = deal(map_tensors(files), config, files.step)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # values of kinds that nobody expects
        raise WeightsError(
            f"{source / 'config.json'} is none of a published checkpoint ({type(error).__name__}: {error})."
        ) from error
    problems += dealt.problems
    needs_vision = files.step is Step.finetune and Part.vision not in dealt.parts
    if needs_vision and locate(config.vision.weights, config.paths) is None:
        lacking = absence(config.vision.weights, config.paths)
        problems.append(f"The checkpoint holds no vision tower, and the cell's: {lacking}")
    if problems:
        raise WeightsError(join_problems([f"{source} does not fit this cell:", *problems]))
    hashes = {path.name: sha256(path) for path in files.paths}
    with TemporaryDirectory() as draft:
        if files.step is Step.finetune:
            hashes |= _write_tokenizer(files, config.llm, Path(draft))
        cell = Cell(composed.choices, config)
        folder = Path(config.paths.runs) / _run_id(cell, files.step, hashes)
        if ledger.is_done(folder):
            return Imported(folder, dealt.report(), is_new=False)
        folder.mkdir(parents=True, exist_ok=True)
        with ledger.locked(folder) as me, disk_full_named(folder):
            attempt = ledger.begin_attempt(folder, me)
            try:
                _write_run(cell, files, dealt, Path(draft), folder, hashes)
            except MorebenchError as error:
                ledger.end_attempt(folder, attempt, error.exit_code, str(error))
                raise
            ledger.end_attempt(folder, attempt, 0, "")
    return Imported(folder, dealt.report(), is_new=True)


def _run_id(cell: Cell, step: Step, hashes: Mapping[str, str]) -> str:
    config = cell.config
    content = {
        "imported": dict(hashes),
        "llm": {**identity(config.llm), "shape": load_shape(config.llm.shape)},
        "vision": {**identity(config.vision), "shape": load_shape(config.vision.shape)},
        "resolution": identity(config.resolution),
        "projector": identity(config.projector),
        "seed": config.seed,
    }
    return f"{cell.name}.{step.name}.{digest(content)}"


def _write_tokenizer(files: CheckpointFiles, llm: LLM, folder: Path) -> dict[str, str]:
    """config.json and a fast tokenizer in `folder`; returns the hashes of the tokenizer files read."""
    config = llm_config(llm_fields(files.config, load_shape(llm.shape)))
    config.save_pretrained(folder)
    hashes = {}
    for name in _TOKENIZER_FILES:
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)
            hashes[name] = sha256(folder / name)
    if "tokenizer.json" not in hashes:
        _make_fast(files.folder, folder)
    tokenizer = load_tokenizer(llm, folder)
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(
            f"The tokenizer in {files.folder} has {len(tokenizer)} tokens, config.json says "
            f"vocab_size {config.vocab_size}."
        )
    return hashes


def _make_fast(source: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow one")
    except Exception as error:  # whatever a converter of transformers trips over
        raise WeightsError(
            f"{source} has no tokenizer.json, and none could be made from its other tokenizer files "
            f"({str(error).strip().splitlines()[0]}). Put the tokenizer.json of the LLM it was trained from "
            "there, or install sentencepiece if it has a tokenizer.model."
        ) from error
    tokenizer.save_pretrained(folder)


def _write_run(
    cell: Cell, files: CheckpointFiles, dealt: Dealt, draft: Path, folder: Path, hashes: Mapping[str, str]
) -> None:
    run_id, config = folder.name, cell.config
    ledger.write_json(folder / "cell.json", cell.axes)
    ledger.write_json(folder / "parents.json", {})
    ledger.write_json(folder / "manifest.json", {"run_id": run_id, "step": files.step.name})
    written = [_save(dealt.parts[Part.projector], folder / "projector.safetensors")]
    if files.step is Step.finetune:
        written.append(_save(dealt.parts[Part.llm], folder / "llm.safetensors"))
        (folder / "llm").mkdir(exist_ok=True)
        for path in draft.iterdir():
            shutil.copyfile(path, folder / "llm" / path.name)
        link = folder / "llm" / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / "llm.safetensors")  # relative, so that the run can be moved
        config = _own_weights(config, dealt, folder)
    save_config(config, folder / "config.yaml")
    facts = {
        "from": str(files.folder.absolute()),
        "files": dict(hashes),
        "config": dict(files.config),
        "keys": dealt.report(),
    }
    update_manifest(
        folder,
        {
            "imported": facts,
            "anomalies": ["imported from a published checkpoint, not trained here"],
            "seed": config.seed,
            "parts": {path.name: sha256(path) for path in written},
            **provenance(ROOT),
        },
    )
    working = (ledger.LOCK, ledger.ATTEMPTS, ledger.DONE)
    artefacts = [path for path in folder.rglob("*") if path.is_file() and path.name not in working]
    ledger.mark_done(folder, [path for path in artefacts if not path.name.startswith(".")])


def _own_weights(config: Config, dealt: Dealt, folder: Path) -> Config:
    """The LLM, and the vision tower if the checkpoint holds one, are read from the run itself."""
    llm = replace(config.llm, weights=_below(folder / "llm"))
    if dealt.tower is None:
        return replace(config, llm=llm)
    tower = folder / "vision"
    tower.mkdir(exist_ok=True)
    _save(dealt.parts[Part.vision], tower / "model.safetensors")
    dealt.tower.save_pretrained(tower)
    encoder = {"_target_": "morebench.models.vision.TransformersEncoder", "name": dealt.tower.model_type}
    vision = replace(config.vision, weights=_below(tower), encoder=encoder)
    return replace(config, llm=llm, vision=vision)


def _below(folder: Path) -> Weights:
    return Weights(folder=str(folder), hub_id=None, revision=None, build=None)


def _save(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
