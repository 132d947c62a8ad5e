"""Checkpoints of our own: hashed, never a pickle, readable by any strategy and number of ranks.

Lightning's `save_checkpoint` keeps the whole file in memory, does not fsync, swallows PermissionError, and
pickles. A checkpoint here is a folder, written by morebench.training.writing:

    checkpoints/step_00000200/{parameters,optimizer,random}.rank0000.safetensors ...  meta.json

A file holds a rank's pieces of flattened tensors; `meta.json` says where in the wholes they lie.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from morebench.errors import RunError, join_problems
from morebench.training.files import sha256
from morebench.training.fragments import Pieces

META = "meta.json"
PREFIX = "step_"
FORMAT = 2


class Piece(NamedTuple):
    """Of a flattened tensor, as a rank's file holds it under the tensor's name."""

    rank: int
    start: int
    length: int


class Layout(NamedTuple):
    shape: tuple[int, ...]
    pieces: list[Piece]  # by start


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int  # optimizer steps done, so the number of the next one
    facts: dict[str, Any]  # choices made by measurement, seconds spent, steps left out
    layouts: Mapping[str, Mapping[str, Layout]]  # kind of tensors -> name -> where it is

    def pieces(self, name: str) -> Pieces:
        """The tensors of one kind: parameters, optimizer, random."""
        return _Stored(self.folder, name, self.layouts[name])


class _Stored:
    def __init__(self, folder: Path, kind: str, layouts: Mapping[str, Layout]) -> None:
        self._layouts = layouts
        self._open = cache(lambda rank: safe_open(folder / file_name(kind, rank), framework="pt"))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self._layouts.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Raises RunError outside the tensor."""
        layout = self._layouts[name]
        if not 0 <= start <= stop <= prod(layout.shape):
            raise RunError(
                f"Elements {start} to {stop} of {name} were asked for, which has {prod(layout.shape)}."
            )
        parts = []
        for piece in layout.pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.length)
            if first < last:
                stored = self._open(piece.rank).get_slice(name)
                parts.append(stored[first - piece.start : last - piece.start])
        if len(parts) == 1:
            return parts[0]
        if parts:
            return torch.cat(parts)
        return self._open(layout.pieces[0].rank).get_tensor(name)[:0]  # nothing, of the right dtype


def file_name(kind: str, rank: int) -> str:
    return f"{kind}.rank{rank:04d}.safetensors"


def layouts_of(ranks: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Layout]]:
    """Put together what each rank says of its pieces: kind -> name -> {"shape", "start", "length"}.

    Raises one RunError for all tensors that have a gap, an overlap or several shapes.
    """
    layouts: dict[str, dict[str, Layout]] = {}
    problems = []
    for rank, kinds in enumerate(ranks):
        for kind, named in kinds.items():
            known = layouts.setdefault(kind, {})
            for name, facts in named.items():
                layout = known.setdefault(name, Layout(tuple(facts["shape"]), []))
                layout.pieces.append(Piece(rank, facts["start"], facts["length"]))
                if layout.shape != tuple(facts["shape"]):
                    problems.append(
                        f"{kind} {name}: shape {list(layout.shape)} on one rank, {facts['shape']} on rank "
                        f"{rank}."
                    )
    for kind, known in layouts.items():
        for name, layout in known.items():
            layout.pieces.sort(key=lambda piece: (piece.start, piece.length))
            end = 0
            for piece in layout.pieces:
                if piece.start != end and piece.length:
                    what = "no rank has" if piece.start > end else "several ranks have"
                    first, last = sorted((piece.start, end))
                    problems.append(f"{kind} {name}: {what} elements {first} to {last}.")
                end = max(end, piece.start + piece.length)
            if end != prod(layout.shape):
                problems.append(
                    f"{kind} {name}: the pieces hold {end} elements, its shape {list(layout.shape)} has "
                    f"{prod(layout.shape)}."
                )
    if problems:
        raise RunError(f"A checkpoint has pieces that do not add up:\n{join_problems(problems)}")
    return layouts


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; `report` gets a line for each that is passed over. Changes nothing."""
    for folder in sorted(checkpoint_folders(root), reverse=True):
        try:
            meta = _read_meta(folder)
            layouts = {
                kind: {
                    name: Layout(tuple(shape), [Piece(*piece) for piece in pieces])
                    for name, (shape, pieces) in named.items()
                }
                for kind, named in meta["layouts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"Checkpoint {folder} is not usable ({error}); looking for an older one.")
            continue
        return Checkpoint(folder, meta["step"], meta["facts"], layouts)
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


def checkpoint_folders(root: Path) -> list[Path]:
    return [path for path in root.glob(f"{PREFIX}*") if path.is_dir()]


def meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    if meta.pop("sha256") != meta_digest(meta):
        raise ValueError(f"{META} was changed")
    if (found := meta.get("format", 1)) != FORMAT:
        raise ValueError(f"it is of format {found}, this version of morebench reads {FORMAT}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = pool.map(lambda name: sha256(folder / name), meta["files"])
        for (name, expected), digest in zip(meta["files"].items(), digests, strict=True):
            if digest != expected:
                raise ValueError(f"{name} has sha256 {digest[:12]}, {META} says {expected[:12]}")
    return meta
