"""Tensors in safetensors files of which every rank reads its own part, and modules that wait for them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from morebench.errors import WeightsError


class Pieces(Protocol):
    """A stored set of named tensors, of which any part can be read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """1-D, on the CPU: elements [start, stop) of the flattened tensor."""


class StoredTensors:
    """`Pieces` of safetensors files: only the rows asked for are read, in the precision of the file."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the headers alone. Raises WeightsError for what is no safetensors file."""
        self._slices: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, "pt")
                self._slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path} cannot be read: {error}") from error
        self.shapes = {name: tuple(found.get_shape()) for name, found in self._slices.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.shapes[name]
        if start == stop:
            return torch.empty(0)
        if not shape:
            whole: Tensor = self._slices[name][...]
            return whole.view(1)
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)
        rows: Tensor = self._slices[name][first:last]
        return rows.flatten()[start - first * row : stop - first * row]


def weight_files(folder: Path) -> list[Path]:
    """Of a folder of transformers weights: the one file, or those its index lists. Raises WeightsError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WeightsError(f"{folder} has neither {single.name} nor {index.name}.")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of safetensors files: {error!r}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise WeightsError(f"{index} lists files that are not there: {', '.join(missing)}.")
    return [folder / name for name in names]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built here have parameters of a shape and a dtype only; buffers (rotary tables) are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied head gets its embeddings' parameter
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
