"""What a task asks: its items, and images that are read when they are needed. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from morebench.evaluation.tasks.benchmark import Benchmark, Question, Record


@dataclass(frozen=True)
class StoredImage:
    """`key` names the content: two images with one key look the same, whatever task they belong to."""

    key: str
    name: str  # for people: a path below the task's images, or a place in its data set
    load: Callable[[], Image.Image]  # RGB; raises SampleError


@dataclass(frozen=True)
class Item:
    """One question of a task. `images`: one per image token of the question, in order."""

    index: int  # in the task's records
    id: str
    record: Record  # without images
    question: Question
    images: tuple[StoredImage, ...]


@dataclass(frozen=True)
class OpenTask:
    name: str
    benchmark: Benchmark
    items: Sequence[Item]
    max_new_tokens: int
