"""Test records in the field names of GQA, POPE and AI2D, plus `image`: several questions per scene."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from morebench.digits.questions import (
    LETTERS,
    Question,
    ask_presence,
    draw_options,
    open_questions,
)
from morebench.digits.world import Scene

IMAGE_SOURCE = "digits"
POPE_CATEGORIES = ("random", "popular", "adversarial")
LOOK_ALIKES = (
    (6, 8),
    (7, 2),
    (3, 7),
    (8, 5),
    (9, 7),
    (6, 3),
    (8, 0),
    (1, 9),
    (0, 3),
    (4, 8),
)  # by digit

Item = tuple[str, Question]  # file name of the image, question


def vqa_records(
    images: Sequence[str], scenes: Sequence[Scene], size: int, rng: np.random.Generator
) -> list[Any]:
    """GQA fields."""
    return [
        {
            "id": f"vqa_{number:05d}",
            "imageId": image.removesuffix(".png"),
            "image": image,
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": question.full_answer,
        }
        for number, (image, question) in enumerate(_balanced(images, scenes, size, rng))
    ]


def multiple_choice_records(
    images: Sequence[str], scenes: Sequence[Scene], size: int, rng: np.random.Generator
) -> list[Any]:
    """AI2D fields; the right option is at each letter equally often."""
    correct = rng.permutation(np.arange(size) % len(LETTERS)).tolist()
    return [
        {
            "id": f"mc_{number:05d}",
            "image": image,
            "question": question.text,
            "options": list(draw_options(question, correct[number], rng)),
            "answer": str(correct[number]),
        }
        for number, (image, question) in enumerate(_balanced(images, scenes, size, rng))
    ]


def pope_records(
    images: Sequence[str], scenes: Sequence[Scene], size: int, rng: np.random.Generator
) -> list[Any]:
    """POPE fields: one yes and one no per image and category.

    The digit of a no is drawn from all absent ones (random), is the most frequent digit of these scenes
    that is absent (popular), or is an absent one that looks like a digit that is there (adversarial).
    """
    frequency = Counter(thing.digit for scene in scenes for thing in scene.things)
    records: list[Any] = []
    for index in rng.permutation(len(scenes)).tolist():
        scene = scenes[index]
        present = rng.permutation([thing.digit for thing in scene.things]).tolist()
        absent = rng.permutation([digit for digit in range(10) if digit not in present]).tolist()
        similar = [alike for digit in present for alike in LOOK_ALIKES[digit] if alike in absent]
        no_digits = (
            absent[0],
            max(absent, key=lambda digit: frequency[digit]),
            (similar or absent)[0],
        )
        for number, (category, no_digit) in enumerate(zip(POPE_CATEGORIES, no_digits, strict=True)):
            for digit in (present[number % len(present)], no_digit):
                question = ask_presence(digit, scene)
                records.append(
                    {
                        "id": str(len(records)),
                        "question_id": str(len(records) + 1),
                        "question": question.text,
                        "answer": question.answer,
                        "image_source": IMAGE_SOURCE,
                        "image": images[index],
                        "category": category,
                    }
                )
    return records[:size]


def _balanced(
    images: Sequence[str], scenes: Sequence[Scene], size: int, rng: np.random.Generator
) -> list[Item]:
    """Each kind of question, and within it each answer, about equally often: blind guessing earns little."""
    pools: dict[str, dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for index in rng.permutation(len(scenes)).tolist():
        for question in open_questions(scenes[index]):
            pools[question.kind][question.answer].append((images[index], question))
    chosen = _take_turns(_take_turns(answers.values()) for answers in pools.values())[:size]
    return [chosen[index] for index in rng.permutation(len(chosen)).tolist()]


def _take_turns(groups: Iterable[Iterable[Item]]) -> list[Item]:
    """The first of each group, then the second of each, ..."""
    return [item for layer in zip_longest(*groups) for item in layer if item is not None]
