"""Records of a JSON list, with images in files beside it."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from morebench.config.schema import Paths, TaskData
from morebench.data.hashes import file_hashes
from morebench.data.image_folder import ImageFolder
from morebench.errors import DataError, join_problems
from morebench.evaluation.image_store import load_image_of
from morebench.evaluation.items import StoredImage, TaskSource, Wanted
from morebench.evaluation.tasks.benchmark import Record


class JsonRecords:
    def __init__(self, name: str, data: TaskData, paths: Paths) -> None:
        assert data.records is not None
        self._task = name
        self._path = Path(paths.data) / data.folder / data.records
        if not self._path.is_file():
            raise DataError(f"{name}: its records are not at {self._path}.")
        self._images = ImageFolder(Path(paths.data) / data.folder / (data.images or ""), data.allowed_links)
        self._records = _read(self._path)
        self.place = str(self._path)
        self._data, self._paths = data, paths

    @cached_property
    def fact(self) -> TaskSource:
        content_hash = str(json_hash(self._data, self._paths))
        return TaskSource("a records file", str(self._path.parent), None, None, content_hash)

    def where(self, row: int) -> str:
        return f"{self._path}: record {row}"

    def records(self, fields: Sequence[str]) -> Sequence[Record]:
        problems = [
            f"{self.where(row)}: no field {', '.join(missing)}; found {', '.join(record)}"
            for row, record in enumerate(self._records)
            if (missing := [field for field in fields if field not in record])
        ]
        if problems:
            raise DataError(join_problems(problems))
        return self._records

    def images(self, wanted: Sequence[Wanted]) -> list[StoredImage]:
        problems: list[str] = []
        names: list[str] = []
        for one in wanted:
            try:
                names.append(name := _named(self._records[one.row], one))
                if not (path := self._images.path(name)).is_file():
                    problems.append(f"{self.where(one.row)}: image {path} does not exist")
            except DataError as error:
                problems.append(f"{self.where(one.row)}: {error}")
        if problems:
            raise DataError(join_problems(problems))
        hashes = file_hashes(self._images.root, sorted(set(names)), Path(self._paths.cache))
        return [self._stored(one, name, hashes[name]) for one, name in zip(wanted, names, strict=True)]

    def _stored(self, wanted: Wanted, name: str, key: str) -> StoredImage:
        path = self._images.path(name)
        where = f"{self._task}: record {wanted.row} (id {wanted.id}), {wanted.place}: {path}"
        return StoredImage(key, name, partial(load_image_of, path, None, where))


def json_hash(data: TaskData, paths: Paths) -> str | None:
    """sha256 over the records and the images they name; None while there is no records file."""
    assert data.records is not None
    path = Path(paths.data) / data.folder / data.records
    if not path.is_file():
        return None
    images = ImageFolder(Path(paths.data) / data.folder / (data.images or ""), data.allowed_links)
    named = [record["image"] for record in _read(path) if record.get("image") is not None]
    names = list(dict.fromkeys(str(n) for one in named for n in (one if isinstance(one, list) else [one])))
    if gone := [str(images.path(name)) for name in names if not images.path(name).is_file()]:
        raise DataError(join_problems(f"{path}: image {name} does not exist." for name in gone))
    digest = hashlib.sha256(path.read_bytes())
    for name, found in file_hashes(images.root, names, Path(paths.cache)).items():
        digest.update(name.encode() + bytes.fromhex(found))
    return digest.hexdigest()


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{path}: expected a non-empty JSON list of objects.")
    return records


def _named(record: Record, wanted: Wanted) -> str:
    """The path of an image."""
    if wanted.column not in record:
        raise DataError(f"no field {wanted.column}")
    value = record[wanted.column]
    if wanted.number is not None and isinstance(value, list) and wanted.number < len(value):
        value = value[wanted.number]
    if not isinstance(value, str):
        raise DataError(f"{wanted.place} must be the path of an image, found {value!r}")
    return value
