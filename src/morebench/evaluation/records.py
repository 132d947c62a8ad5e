"""Records of a task, read and checked before any model is loaded. No torch."""

import hashlib
import json
from functools import partial
from pathlib import Path

from morebench.config.compose import build
from morebench.config.schema import Paths, Profile, Task, TaskData
from morebench.data.image_folder import ImageFolder
from morebench.data.images import load_image
from morebench.errors import DataError, join_problems
from morebench.evaluation.items import Item, OpenTask, StoredImage
from morebench.evaluation.tasks.benchmark import Benchmark, Record


def open_task(name: str, task: Task, paths: Paths, profile: Profile) -> OpenTask:
    """Raises one DataError for all records that lack a field, an answer or an image."""
    benchmark: Benchmark = build(task.code)
    path = _records_path(task.data, paths)
    if path is None or not path.is_file():
        raise DataError(f"{name}: its records are not at {path or Path(paths.data) / task.data.folder}.")
    records = _read(path)
    folder = _images(task.data, paths)
    items, problems = [], []
    for index, record in enumerate(records):
        try:
            items.append(_item(index, record, benchmark, profile, folder))
        except DataError as error:
            problems.append(f"{path}: record {index}: {error}")
    if problems:
        raise DataError(join_problems(problems))
    if task.data.num_rows is not None and len(items) != task.data.num_rows:
        raise DataError(f"{path}: {len(items)} records, expected the published {task.data.num_rows}.")
    return OpenTask(name, benchmark, items, task.max_new_tokens[profile.name])


def task_hash(data: TaskData, paths: Paths) -> str | None:
    """sha256 over the records and the images they name; None while there is no records file."""
    path = _records_path(data, paths)
    if path is None or not path.is_file():
        return None
    digest = hashlib.sha256(path.read_bytes())
    folder = _images(data, paths)
    for name in dict.fromkeys(str(record["image"]) for record in _read(path) if "image" in record):
        image = folder.path(name)
        if not image.is_file():
            raise DataError(f"{path}: image {image} does not exist.")
        digest.update(name.encode() + hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()


def _records_path(data: TaskData, paths: Paths) -> Path | None:
    return Path(paths.data) / data.folder / data.records if data.records else None


def _images(data: TaskData, paths: Paths) -> ImageFolder:
    return ImageFolder(Path(paths.data) / data.folder / (data.images or ""), data.allowed_links)


def _read(path: Path) -> list[Record]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{path}: expected a non-empty JSON list of objects.")
    return records


def _item(index: int, record: Record, benchmark: Benchmark, profile: Profile, folder: ImageFolder) -> Item:
    if missing := [field for field in benchmark.fields if field not in record]:
        raise DataError(f"no field {', '.join(missing)}; found {', '.join(record)}")
    try:
        question = benchmark.question(record, profile)
        benchmark.target(record)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise DataError(
            f"a field is not of the type that {type(benchmark).__name__} needs: {error!r}"
        ) from error
    if absent := [field for field in question.images if field not in record]:
        raise DataError(f"no field {', '.join(absent)}")
    names = [str(record[field]) for field in question.images]
    paths = [folder.path(name) for name in names]
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise DataError(f"image {', '.join(gone)} does not exist")
    images = tuple(
        StoredImage(hashlib.sha256(path.read_bytes()).hexdigest(), name, partial(load_image, path))
        for name, path in zip(names, paths, strict=True)
    )
    return Item(index, str(record.get("id", index)), record, question, images)
