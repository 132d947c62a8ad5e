"""What a digits scene holds, and how it is told in words. No pixels here: the LLM's text uses it too."""

from dataclasses import dataclass

import numpy as np

NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
COLOURS = {
    "red": (235, 60, 50),
    "green": (50, 205, 80),
    "blue": (70, 110, 255),
    "yellow": (240, 220, 50),
    "white": (240, 240, 240),
    "purple": (195, 70, 230),
}
PLACES = (
    "top left",
    "top right",
    "bottom left",
    "bottom right",
)  # quadrants, in reading order


@dataclass(frozen=True)
class Thing:
    """One digit. Digit, colour and place are each unique in a scene, so any of them names it."""

    digit: int
    colour: str
    place: str

    @property
    def name(self) -> str:
        return NUMBERS[self.digit]

    def __str__(self) -> str:
        return f"a {self.colour} {self.name} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in reading order

    def caption(self, order: tuple[int, ...] | None = None) -> str:
        """`order`: indices of `things`; None is reading order."""
        told = [str(self.things[index]) for index in order or range(len(self.things))]
        return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def draw_scene(rng: np.random.Generator) -> Scene:
    """1 to 4 things, uniformly."""
    count = int(rng.integers(1, len(PLACES) + 1))
    places = sorted(rng.permutation(len(PLACES))[:count].tolist())
    digits = rng.permutation(len(NUMBERS))[:count].tolist()
    colours = rng.permutation(list(COLOURS))[:count].tolist()
    return Scene(
        tuple(
            Thing(digit, colour, PLACES[place])
            for digit, colour, place in zip(digits, colours, places, strict=True)
        )
    )
