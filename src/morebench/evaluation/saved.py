"""Data sets that `datasets` saved with `save_to_disk`: which of their files hold a config's split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morebench.errors import DataError
from morebench.evaluation.layout import DEFAULT

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def saved_files(folder: Path, config: str | None, split: str) -> Sequence[str] | None:
    """Names below `folder`; None if nothing was saved there. Raises DataError with the reason alone.

    One config lies in `folder` itself, several in `folder/<config>`; each is a Dataset or a DatasetDict.
    """
    own = folder / (config or DEFAULT)
    if not _is_saved(own):
        if not _is_saved(folder):
            if others := [path.name for path in sorted(folder.glob("*/")) if _is_saved(path)]:
                raise DataError(f"there is no config {config or DEFAULT}; there is: {', '.join(others)}")
            return None
        own = folder
    if (own / _DICT).is_file():
        splits = _read(own / _DICT).get("splits", [])
        if split not in splits:
            raise DataError(f"{own / _DICT} names no split {split}; it names: {', '.join(splits)}")
        own = own / split
    state, info = _read(own / _STATE), _read(own / _INFO)
    if state.get("_split") not in (None, split):
        raise DataError(f"{own / _STATE}: expected split {split}, found {state['_split']}")
    # `default` is what `datasets` calls files that were given to it without a config
    if not str(found := info.get("config_name") or DEFAULT).startswith(DEFAULT) and found != config:
        raise DataError(f"{own / _INFO}: expected config {config or DEFAULT}, found {found}")
    names = [own / str(file.get("filename")) for file in state.get("_data_files", [])]
    if gone := [str(path) for path in names if path.parent != own or not path.is_file()]:
        raise DataError(f"{own / _STATE} names {', '.join(gone)}, which is not a file there")
    return [path.relative_to(folder).as_posix() for path in names]


def _is_saved(folder: Path) -> bool:
    return (folder / _DICT).is_file() or (folder / _STATE).is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content
