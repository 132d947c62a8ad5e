"""A model that need not be loaded: it knows every item's answer, and how often to miss it."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

from morebench.evaluation import asking
from morebench.evaluation.asking import Asked
from morebench.evaluation.chunks import Request
from morebench.evaluation.generate import Answer
from morebench.evaluation.items import Item
from morebench.evaluation.tasks.benchmark import Benchmark

MANNERS = {"right": 60, "wrong": 22, "wordy": 5, "lower": 4, "odd": 3, "unparsable": 3, "empty": 3}
"""Manner of answering -> its share in percent."""
Question = tuple[bytes, tuple[str, ...]]  # a prompt's ids, keys of its images


def replies(asked: Asked, manner: str | None = None) -> dict[Question, str]:
    """What the model says to every question; always in one manner, or in the mix of all.

    Items that ask the same words about the same image get the answer of the first one, as from any model.
    """
    book: dict[Question, str] = {}
    for request, (sheet, at) in zip(asked.requests, asked.places, strict=True):
        task = asked.sheets[sheet].task
        item = task.items[at]
        draw = random.Random(f"{task.name} {item.index}")
        chosen = manner or draw.choices(list(MANNERS), weights=list(MANNERS.values()))[0]
        book.setdefault(_question(request), _reply(task.benchmark, item, chosen, draw))
    return book


def _question(request: Request) -> Question:
    text = request.prompt.input_ids[~request.prompt.visual_mask].tobytes()
    return text, tuple(image.key for image in request.images)


def _reply(benchmark: Benchmark, item: Item, manner: str, draw: random.Random) -> str:
    target = benchmark.target(item.record)
    right = target if isinstance(target, str) else Counter(target).most_common(1)[0][0]
    if manner == "right":
        return right
    if manner == "wrong":
        return _another(right, draw)
    if manner == "lower":
        return right.lower()
    if manner == "wordy":
        return f"{right}. It can be seen {'clearly, ' * draw.randint(1, 30)}I think.\n"
    if manner == "odd":
        return draw.choice(
            [f"({right})", f"The answer is {right}", f"**{right}**", f" {right}\n\n", f"{right}。"]
        )
    return (
        "" if manner == "empty" else draw.choice(["I cannot tell.", "???", "nan", "\U0001f600", "The image"])
    )


def _another(right: str, draw: random.Random) -> str:
    if right.lower() in ("yes", "no"):
        return "no" if right.lower() == "yes" else "yes"
    if len(right) == 1:
        return draw.choice([letter for letter in "AB" if letter != right])
    return "zebra"


class _Generator:
    """Stands in for `generate.Generator`; decodes every image once, as a shared prefix does."""

    def __init__(self, book: dict[Question, str]) -> None:
        self.out_of_memory = 0
        self._book = book
        self._seen: set[str] = set()

    def answer(self, requests: Sequence[Request], share: bool = True) -> list[Answer]:
        for request in requests:
            for image in request.images:
                if image.key not in self._seen:
                    self._seen.add(image.key)
                    assert np.asarray(image.load()).shape[2] == 3
        texts = [self._book[_question(request)] for request in requests]
        return [Answer(text, len(text.encode()), 0, 0, True) for text in texts]


@contextmanager
def standing_in(book: dict[Question, str]) -> Iterator[None]:
    """The evaluate step asks the book instead of a model. Of this process alone: one device."""
    model = SimpleNamespace(cache_positions=lambda gib: None)
    with (
        patch.object(asking, "load_model", lambda *_: model),
        patch.object(asking, "Generator", lambda _: _Generator(book)),
    ):
        yield
