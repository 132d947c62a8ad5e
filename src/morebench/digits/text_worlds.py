"""What a tiny LLM reads before it ever sees an image: scenes in words, and questions about them."""

from collections.abc import Sequence

import numpy as np

from morebench.data.records import Sample, Turn
from morebench.digits.conversations import DESCRIBE, draw_exchanges, draw_fact
from morebench.digits.world import Scene, Thing, draw_scene

MAX_QUESTIONS = 4


def draw_chat(rng: np.random.Generator) -> Sample:
    """Facts (1 in 8), or a scene told as a sentence or as notes, then questions about it."""
    if rng.integers(8) == 0:
        return _sample([draw_fact(rng) for _ in range(MAX_QUESTIONS)])
    scene = draw_scene(rng)
    exchanges = draw_exchanges(scene, int(rng.integers(2, MAX_QUESTIONS + 1)), rng)
    if rng.integers(4) == 0:
        exchanges.insert(0, (DESCRIBE[int(rng.integers(len(DESCRIBE)))], scene.caption()))
    question, answer = exchanges[0]
    return _sample([(f"{_told(scene, rng)}\n{question}", answer), *exchanges[1:]])


def draw_page(rng: np.random.Generator) -> tuple[str, str]:
    """Notes and the caption they amount to: what pretrain will ask for, with an image instead of notes."""
    scene = draw_scene(rng)
    return f"{draw_notes(scene, rng)}\n", f"{scene.caption()}\n"


def draw_notes(scene: Scene, rng: np.random.Generator) -> str:
    """Bags of words, thing by thing, in any order: nearer to what patches give than a sentence is."""
    order = rng.permutation(len(scene.things)).tolist()
    return ". ".join(" ".join(_shuffled(_words(scene.things[index]), rng)) for index in order)


def _told(scene: Scene, rng: np.random.Generator) -> str:
    if rng.integers(2):
        return draw_notes(scene, rng)
    return f"The image shows {scene.caption(tuple(rng.permutation(len(scene.things)).tolist()))}."


def _words(thing: Thing) -> list[str]:
    return [thing.colour, thing.name, thing.place]


def _shuffled(words: list[str], rng: np.random.Generator) -> list[str]:
    return [words[index] for index in rng.permutation(len(words)).tolist()]


def _sample(exchanges: Sequence[tuple[str, str]]) -> Sample:
    return Sample("text", (), tuple(Turn(question, answer) for question, answer in exchanges))
