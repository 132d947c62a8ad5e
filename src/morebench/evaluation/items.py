"""What a task asks: its items, and images that are read when they are needed. No torch."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from morebench.data.findings import SampleError
from morebench.data.images import decode_image, read_image
from morebench.evaluation.tasks.benchmark import Benchmark, Question, Record


@dataclass(frozen=True)
class StoredImage:
    """`key` names the content: two images with one key look the same, whatever task they belong to."""

    key: str
    name: str  # for people: a path below the task's images, or a place in its data set
    load: Callable[[], Image.Image]  # RGB; raises SampleError


@dataclass(frozen=True)
class Wanted:
    """An image that a question is about."""

    row: int
    place: str  # `image`, which may be a list of one; or `image[2]`: one of a list
    id: str  # of the item, for people

    @property
    def column(self) -> str:
        return self.place.partition("[")[0]

    @property
    def number(self) -> int | None:
        """In the list."""
        number = self.place.partition("[")[2]
        return int(number.removesuffix("]")) if number else None


@dataclass(frozen=True)
class Item:
    """One question of a task. `images`: one per image token of the question, in order."""

    index: int  # in the task's records
    id: str
    record: Record  # without images
    question: Question
    images: tuple[StoredImage, ...]


@dataclass(frozen=True)
class TaskSource:
    """Where records come from; belongs into results."""

    origin: str  # for people: a local mirror, the Hugging Face cache, a records file
    folder: str
    hub_id: str | None
    commit: str | None  # of the hub's repository, where known
    content_hash: str  # as in the run id


@dataclass(frozen=True)
class OpenTask:
    name: str
    benchmark: Benchmark
    items: Sequence[Item]
    max_new_tokens: int
    source: TaskSource


def image_file(path: Path) -> StoredImage:
    """A file of the user's own, read and decoded now. Raises SampleError."""
    try:
        content = read_image(path)
        image = decode_image(content)
    except SampleError as error:
        raise SampleError(error.kind, f"{path}: {error.reason}") from None
    return StoredImage(hashlib.sha256(content).hexdigest(), str(path), lambda: image)
