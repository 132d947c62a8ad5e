"""Questions about a scene, in the prompts of GQA, POPE and AI2D."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from morebench.digits.world import COLOURS, NUMBERS, PLACES, Scene, Thing

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"
COUNTS = ("1", "2", "3", "4")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    full_answer: str
    kind: str
    choices: tuple[str, ...]  # every answer this kind of question can have


def ask_digit_by_place(thing: Thing) -> Question:
    return _ask(
        f"What digit is at the {thing.place}?",
        thing.name,
        thing,
        "digit_by_place",
        NUMBERS,
    )


def ask_digit_by_colour(thing: Thing) -> Question:
    return _ask(f"What digit is {thing.colour}?", thing.name, thing, "digit_by_colour", NUMBERS)


def ask_colour_by_place(thing: Thing) -> Question:
    text = f"What colour is the digit at the {thing.place}?"
    return _ask(text, thing.colour, thing, "colour_by_place", tuple(COLOURS))


def ask_colour_by_digit(thing: Thing) -> Question:
    return _ask(
        f"What colour is the {thing.name}?",
        thing.colour,
        thing,
        "colour_by_digit",
        tuple(COLOURS),
    )


def ask_place_by_digit(thing: Thing) -> Question:
    return _ask(f"Where is the {thing.name}?", thing.place, thing, "place_by_digit", PLACES)


def ask_place_by_colour(thing: Thing) -> Question:
    return _ask(
        f"Where is the {thing.colour} digit?",
        thing.place,
        thing,
        "place_by_colour",
        PLACES,
    )


ASK_THING: tuple[Callable[[Thing], Question], ...] = (
    ask_digit_by_place,
    ask_digit_by_colour,
    ask_colour_by_place,
    ask_colour_by_digit,
    ask_place_by_digit,
    ask_place_by_colour,
)


def ask_count(scene: Scene) -> Question:
    count = str(len(scene.things))
    full = f"There {'is' if count == '1' else 'are'} {count}."
    return Question("How many digits are there?", count, full, "count", COUNTS)


def open_questions(scene: Scene) -> list[Question]:
    """Every question of every kind that has one right answer in this scene."""
    return [ask_count(scene)] + [ask(thing) for thing in scene.things for ask in ASK_THING]


def ask_presence(digit: int, scene: Scene) -> Question:
    answer = "yes" if any(thing.digit == digit for thing in scene.things) else "no"
    article = "an" if NUMBERS[digit] == "eight" else "a"
    text = f"Is there {article} {NUMBERS[digit]} in the image?"
    return Question(text, answer, answer, "presence", ("yes", "no"))


def ask_attribute(thing: Thing, rng: np.random.Generator) -> Question:
    """Yes or no, evenly: is this digit of that colour, or at that place?"""
    truth, values, middle = [
        (thing.colour, tuple(COLOURS), ""),
        (thing.place, PLACES, "at the "),
    ][int(rng.integers(2))]
    answer = "yes" if rng.integers(2) else "no"
    other = [value for value in values if value != truth]
    value = truth if answer == "yes" else other[int(rng.integers(len(other)))]
    text = f"Is the {thing.name} {middle}{value}?"
    return Question(text, answer, answer, "attribute", ("yes", "no"))


def draw_presence(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes or no, evenly."""
    present = [thing.digit for thing in scene.things]
    absent = [digit for digit in range(10) if digit not in present]
    digits = present if rng.integers(2) else absent
    return ask_presence(digits[int(rng.integers(len(digits)))], scene)


def draw_options(question: Question, correct: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Four different options, the right one at index `correct`."""
    others = [choice for choice in question.choices if choice != question.answer]
    options = [others[index] for index in rng.permutation(len(others))[: len(LETTERS) - 1]]
    options.insert(correct, question.answer)
    return tuple(options)


def with_options(text: str, options: tuple[str, ...]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([text, *lines]) + LETTER_ANSWER


def _ask(text: str, answer: str, thing: Thing, kind: str, choices: tuple[str, ...]) -> Question:
    full = f"The digit at the {thing.place} is a {thing.colour} {thing.name}."
    return Question(text, answer, full, kind, choices)
