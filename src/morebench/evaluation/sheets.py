"""The suite as it is asked: every task, and again under every control. No torch."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from morebench.config.schema import Config
from morebench.data.findings import SampleError
from morebench.errors import DataError, join_problems
from morebench.evaluation.controls import Images, check_controls, shown
from morebench.evaluation.items import Item, OpenTask, StoredImage
from morebench.evaluation.records import open_task


@dataclass(frozen=True)
class Sheet:
    """The questions of one task under one control (None: about their own images); one file of predictions."""

    task: OpenTask
    control: str | None
    images: Images  # of every item

    @property
    def file(self) -> str:
        return f"{self.task.name}.{self.control}.jsonl" if self.control else f"{self.task.name}.jsonl"

    @property
    def label(self) -> str:
        return f"{self.task.name} {self.control}" if self.control else self.task.name

    @property
    def num_images(self) -> int:
        """Different ones."""
        return len({image.key for own in self.images for image in own})

    def images_sha256(self, position: int) -> str:
        return hashlib.sha256("\n".join(image.key for image in self.images[position]).encode()).hexdigest()

    def line(self, position: int, asked: dict[str, str], answer: dict[str, Any]) -> dict[str, Any]:
        """Of predictions/. `answer`: fields of an Answer."""
        item = self.task.items[position]
        return {
            "index": item.index,
            "id": item.id,
            "image": ", ".join(image.name for image in self.images[position]),
            "question": item.question.text,
            "target": self.task.benchmark.target(item.record),
            "prediction": answer["text"],
            **asked,
            **{key: value for key, value in answer.items() if key != "text"},
        }


def open_sheets(config: Config) -> list[Sheet]:
    """Tasks in the suite's order, each followed by its controls.

    Raises ConfigError for an unknown control, and one DataError for everything that is wrong with any task.
    """
    recipe = config.stage.evaluate
    check_controls(recipe.controls)
    sheets: list[Sheet] = []
    problems: list[str] = []
    for name, task in config.suite.tasks.items():
        try:
            opened = open_task(name, task, config.paths, recipe.profile)
            sheets += _sheets(opened, recipe.controls)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems(problems))
    return sheets


def _sheets(task: OpenTask, controls: Sequence[str]) -> Iterator[Sheet]:
    own = [tuple(_named(task.name, item, image) for image in item.images) for item in task.items]
    for control in (None, *controls):
        yield Sheet(task, control, shown(control, task.name, own))


def _named(task: str, item: Item, image: StoredImage) -> StoredImage:
    return StoredImage(image.key, image.name, partial(_load, image, f"{task}, item {item.id}"))


def _load(image: StoredImage, where: str) -> Image.Image:
    try:
        return image.load()
    except SampleError as error:
        raise SampleError(error.kind, f"{where}: image {image.name}: {error.reason}") from None
