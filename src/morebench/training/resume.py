"""Checkpoints of our own: hashed, verified, never a pickle.

Lightning's `save_checkpoint` keeps the whole file in memory, does not fsync, swallows PermissionError, and
pickles. A checkpoint here is a folder:

    checkpoints/step_00000200/{parameters,optimizer,random}.safetensors  meta.json

written under another name, forced to the disk, read back, and renamed only then.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from morebench.errors import RunError
from morebench.training.files import disk_full_named, remove_folder, replace, sha256, sync
from morebench.training.fragments import Fragment, Pieces

_META = "meta.json"
_PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int  # optimizer steps done, so the number of the next one
    facts: dict[str, Any]  # choices made by measurement, seconds spent

    def pieces(self, name: str) -> Pieces:
        """The tensors of `<name>.safetensors`."""
        return _Stored(load_file(self.folder / f"{name}.safetensors"))


class _Stored:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].flatten()[start:stop]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Fragment]], facts: Mapping[str, Any]
) -> Path:
    """Write `root/step_<step>`, one safetensors file per key of `tensors`; then remove the older ones.

    Raises DiskFullError (what was there stays) and RunError when what is read back is not what was written.
    """
    target = root / f"{_PREFIX}{step:08d}"
    aside = root / f".{target.name}.tmp-{os.getpid()}"
    for leftover in root.glob(f".{_PREFIX}*"):  # of killed starts; large enough to fill a disk
        remove_folder(leftover)
    with disk_full_named(target):
        try:
            aside.mkdir(parents=True)
            hashes = {}
            for name, named in tensors.items():
                path = aside / f"{name}.safetensors"
                wholes = {key: piece.values.view(piece.shape) for key, piece in named.items()}
                save_file(wholes, path)
                sync(path)
                hashes[path.name] = sha256(path)
                _verify(path, wholes)
            meta = {"step": step, "files": hashes, "facts": dict(facts)}
            (aside / _META).write_text(json.dumps({**meta, "sha256": _digest(meta)}))
            sync(aside / _META)
            sync(aside)
            remove_folder(target)  # a corrupt one of the same step
            replace(aside, target)
        finally:
            remove_folder(aside)
    for other in _folders(root):
        if other != target:
            remove_folder(other)
    return target


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; `report` gets a line for each that is passed over. Changes nothing."""
    for folder in sorted(_folders(root), reverse=True):
        try:
            meta = _read_meta(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"Checkpoint {folder} is not usable ({error}); looking for an older one.")
            continue
        return Checkpoint(folder, meta["step"], meta["facts"])
    return None


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Raises RunError when a parameter has no state."""
    state: dict[int, dict[str, Tensor]] = {
        index: {
            key.removeprefix(f"{name}/"): value
            for key, value in tensors.items()
            if key.rpartition("/")[0] == name
        }
        for index, name in enumerate(names)
    }
    if missing := [names[index] for index, found in state.items() if not found]:
        raise misfit(f"no optimizer state for {missing}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises RunError when names or shapes differ."""
    check_shapes(parameters, {name: tuple(value.shape) for name, value in tensors.items()})
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def check_shapes(parameters: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises RunError when names or shapes differ."""
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    if expected != found:
        different = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise misfit(f"names or shapes differ at {different[:5]}")


def misfit(reason: str) -> RunError:
    return RunError(
        f"The checkpoint was written by another model: {reason}. "
        "Remove the run folder's checkpoints/ to train this step from its start."
    )


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob(f"{_PREFIX}*") if path.is_dir()]


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / _META).read_text())
    if meta.pop("sha256") != _digest(meta):
        raise ValueError(f"{_META} was changed")
    for name, expected in meta["files"].items():
        if (found := sha256(folder / name)) != expected:
            raise ValueError(f"{name} has sha256 {found[:12]}, {_META} says {expected[:12]}")
    return meta


def _verify(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """What the file system gives back is, bit by bit, what is in memory."""
    back = load_file(path)
    for name, value in tensors.items():
        # as bytes: NaN is not equal to itself
        found, expected = (
            x.detach().cpu().contiguous().view(-1).view(torch.uint8) for x in (back[name], value)
        )
        if not torch.equal(found, expected):
            raise RunError(f"{path}: {name} reads back different from what was written. Is the disk sound?")
