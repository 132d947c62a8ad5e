"""What a tiny LLM reads before it ever sees an image: scenes in words, and questions about them."""

from collections.abc import Sequence

import numpy as np

from morebench.data.records import Sample, Turn
from morebench.digits.conversations import DESCRIBE, draw_exchanges, draw_fact, draw_question
from morebench.digits.world import COLOURS, NUMBERS, PLACES, Scene, Thing, draw_scene

MAX_QUESTIONS = 4
LOOKUPS = 8  # on a page of cards or questions
CARDS_SHARE, CAPTION_SHARE = 0.6, 0.06  # of pages; the others are questions
PRESENCE_SHARE = 0.3  # of cards

Piece = tuple[str, bool]  # text, and whether the reader has to predict it


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


def draw_page(rng: np.random.Generator) -> list[Piece]:
    """A told scene, then many lookups in it without a chat layout: far more to learn per token than a chat.

    Cards give one attribute of a thing and ask for the other two, or whether it is there at all: what
    belongs together is learnt from them first, and the questions after it.
    """
    scene = draw_scene(rng)
    kind = rng.random()
    if kind < CAPTION_SHARE:  # what pretrain will ask for, with an image instead of notes
        return [(f"{draw_notes(scene, rng)}\n", False), (f"{scene.caption()}\n", True)]
    pieces = [(f"{_told(scene, rng)}\n", False)]
    for _ in range(LOOKUPS):
        if kind < CAPTION_SHARE + CARDS_SHARE:
            key, answer = draw_card(scene, rng)
            pieces += [(key, False), (f" {answer}\n", True)]
        else:
            question = draw_question(scene, rng)
            pieces += [(f"{question.text}\n", False), (f"{question.answer}\n", True)]
    return pieces


def draw_card(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """`green:` is answered by what is green, `green?` by yes or no."""
    told = _words(scene.things[int(rng.integers(len(scene.things)))])
    kind = int(rng.integers(len(told)))
    key = told.pop(kind)
    if rng.random() >= PRESENCE_SHARE:
        return f"{key}:", " ".join(told)
    there = {_words(thing)[kind] for thing in scene.things}
    absent = [value for value in (tuple(COLOURS), NUMBERS, PLACES)[kind] if value not in there]
    if absent and rng.integers(2):
        return f"{absent[int(rng.integers(len(absent)))]}?", "no"
    return f"{key}?", "yes"


def draw_notes(scene: Scene, rng: np.random.Generator) -> str:
    """Bags of words, thing by thing, in any order: nearer to what patches give than a sentence is."""
    order = rng.permutation(len(scene.things)).tolist()
    return " ".join(f"{' '.join(_shuffled(_words(scene.things[index]), rng))}." for index in order)


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
