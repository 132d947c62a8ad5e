"""The files of a published LLaVA-style checkpoint: which ones, and their tensors, mapped and not copied."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from morebench.config.schema import Step
from morebench.errors import WeightsError, join_problems
from morebench.models.weights import is_lfs_pointer

# In order of preference: safetensors before pickles, a whole model before a projector alone.
_WHOLE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_PROJECTOR = ("mm_projector.safetensors", "mm_projector.bin")


@dataclass(frozen=True)
class CheckpointFiles:
    """`step` is what the checkpoint can stand for: finetune for a whole model, pretrain for a projector."""

    folder: Path
    step: Step
    paths: tuple[Path, ...]  # config.json, the index if there is one, and every file of tensors
    config: Mapping[str, Any]  # config.json

    @property
    def weights(self) -> list[Path]:
        return [path for path in self.paths if path.suffix != ".json"]


def find_files(folder: Path) -> CheckpointFiles:
    """Raises one WeightsError for all files that are missing."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder.")
    found = next((name for name in (*_WHOLE, *_PROJECTOR) if (folder / name).is_file()), None)
    problems = [] if (folder / "config.json").is_file() else [f"{folder} has no config.json."]
    if found is None:
        problems.append(f"{folder} has no weights: expected one of {', '.join((*_WHOLE, *_PROJECTOR))}.")
        raise WeightsError(join_problems(problems))
    names = [found]
    if found.endswith(".index.json"):
        weight_map = _read_json(folder / found).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        names += sorted({name for name in named if isinstance(name, str)})
        if (
            not all(isinstance(name, str) for name in named)
            or len(names) == 1
            or any(Path(name).name != name for name in names)
        ):
            problems.append(f"{folder / found}: expected weight_map: tensor -> file in the same folder.")
        problems += [
            f"{folder / name}: named by {found}, but missing."
            for name in names
            if not (folder / name).is_file()
        ]
    if problems:
        raise WeightsError(join_problems(problems))
    step = Step.pretrain if found in _PROJECTOR else Step.finetune
    paths = tuple(folder / name for name in ("config.json", *names))
    return CheckpointFiles(folder, step, paths, _read_json(folder / "config.json"))


def map_tensors(files: CheckpointFiles) -> dict[str, Tensor]:
    """Every tensor by its name in the checkpoint, memory-mapped, in the checkpoint's dtype.

    Raises one WeightsError for unreadable files, for pickles that hold more than tensors, and for names that
    two files have.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in files.weights:
        if is_lfs_pointer(path):
            problems.append(f"{path} is a pointer of git-LFS, not the file. Run: git lfs pull")
            continue
        try:
            content = _map_safetensors(path) if path.suffix == ".safetensors" else _map_pickle(path)
        except Exception as error:  # what torch.load makes of a file that is no pickle knows no limits
            problems.append(f"{path}: {_unreadable(path, error)}")
            continue
        problems += [f"{name}: in {path} and in another file." for name in content.keys() & tensors.keys()]
        for name, value in content.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                tensors[str(name)] = value
                if not value.isfinite().all():
                    problems.append(f"{name}: holds NaN or infinite values in {path}.")
            else:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                problems.append(f"{name}: expected a floating-point tensor in {path}, found {kind}.")
    if problems:
        raise WeightsError(join_problems(problems))
    return tensors


def _map_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _map_pickle(path: Path) -> dict[str, Any]:
    """Tensors only: `weights_only` refuses a pickle that names anything else, before it could run."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise RuntimeError(f"expected a dict of tensors, found {type(content).__name__}")
    return content


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return (
            "the pickle holds more than tensors. Such a file can run any program when it is opened, so it "
            "was not. Ask for safetensors, or convert it on a machine that you can afford to lose."
        )
    return f"cannot be read: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
