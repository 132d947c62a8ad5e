"""What the records of each published source look like: ids, image paths, turns and lengths."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from morebench.data.records import IMAGE_TOKEN
from morebench.data.subset.instructions import human_turn

Turns = list[tuple[str, str]]
SHORT = "\nAnswer with a word or a phrase."
COCO_IMAGES = 117_000  # of which the four COCO sources show nearly all, many more than once


def words(generator: random.Random, number: int) -> str:
    """That many words of a made-up language, with full stops."""
    tape, starts = _tape()
    first = generator.randrange(len(starts) - number - 1)
    return tape[starts[first] : starts[first + number] - 1]


@cache
def _tape() -> tuple[str, list[int]]:
    """A long text, and where its words begin."""
    generator = random.Random(0)
    syllables = [a + b for a in [*"bdfgklmnprstv", "st", "tr"] for b in [*"aeiou", "en", "or"]]
    vocabulary = [
        "".join(generator.choices(syllables, k=1 + (rank > 50) + (rank > 2_000))) for rank in range(12_000)
    ]
    frequent_first = list(accumulate(1 / (rank + 3) for rank in range(len(vocabulary))))
    drawn = generator.choices(vocabulary, cum_weights=frequent_first, k=200_000)
    marked = [word + ("." if generator.random() < 0.07 else "") for word in drawn]
    return " ".join(marked), [0, *accumulate(len(word) + 1 for word in marked)]


def between(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda generator: generator.randint(low, high)


def about(median: float, spread: float, most: int) -> Callable[[random.Random], int]:
    """Log-normal: a few are much longer than most."""
    return lambda generator: min(most, 1 + int(median * generator.lognormvariate(0, spread)))


@dataclass(frozen=True)
class Dialogue:
    """Turns of about equal lengths, counted in words."""

    turns: Callable[[random.Random], int]
    question: Callable[[random.Random], int]
    answer: Callable[[random.Random], int]
    suffix: str = ""  # of the first question

    def __call__(self, generator: random.Random) -> Turns:
        return [
            (
                words(generator, self.question(generator)) + ("" if turn else self.suffix),
                words(generator, self.answer(generator)),
            )
            for turn in range(self.turns(generator))
        ]


@dataclass(frozen=True)
class Source:
    name: str
    records: int
    images: int  # distinct ones; 0: text only
    path: Callable[[int], str]  # of an image number
    turns: Callable[[random.Random], Turns]
    id: Callable[[int, int], str | int] = lambda number, image: image  # of record and image numbers
    first_image: int = 0

    @property
    def own_images(self) -> bool:
        """Whether no other record shows an image of a record."""
        return self.images == self.records

    def record(self, generator: random.Random, number: int, scale: float) -> dict[str, Any]:
        pool = max(1, round(self.images * scale))
        image = (self.first_image + number) % pool if self.images else 0
        record: dict[str, Any] = {"id": self.id(number, image)}
        if self.images:
            record["image"] = self.path(image)
        else:
            record["model"] = ""
        messages = []
        for turn, (question, answer) in enumerate(self.turns(generator)):
            if self.images and turn == 0 and IMAGE_TOKEN not in question:
                question = f"{question}\n{IMAGE_TOKEN}" if number % 8 == 0 else f"{IMAGE_TOKEN}\n{question}"
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return record | {"conversations": messages}


def _lcs_number(image: int) -> int:
    return 2 + image * 11 + image % 7


def _coco(image: int) -> str:
    return f"coco/train2017/{_coco_id(0, image)}.jpg"


def _coco_id(number: int, image: int) -> str:
    return f"{9 + image * 5 - image % 3:012d}"


def _vg(image: int) -> str:
    return f"vg/VG_100K{'_2' if image % 3 == 0 else ''}/{2_300_000 + image}.jpg"


def _caption(generator: random.Random) -> Turns:
    return [(human_turn(generator.randrange(10_000)), words(generator, about(9, 0.4, 60)(generator)))]


def _llava_instruct(generator: random.Random) -> Turns:
    """Conversations, and one long answer: a description or a piece of reasoning."""
    if generator.random() < 0.37:
        return Dialogue(between(2, 7), between(6, 14), about(22, 0.5, 120))(generator)
    return Dialogue(between(1, 1), between(9, 22), about(95, 0.3, 260))(generator)


def _boxes(generator: random.Random, turns: int, region_first: bool) -> Turns:
    """Regions are told by their words or by four coordinates, and asked for by the other."""
    pairs = []
    for _ in range(turns):
        box = "[" + ", ".join(f"{generator.random():.2f}" for _ in range(4)) + "]"
        region = words(generator, generator.randint(2, 8))
        pairs.append((f"Tell what is in {box}.", region) if region_first else (f"Where is {region}?", box))
    return pairs


CAPTIONS = Source(
    "lcs",
    558_128,
    558_128,
    lambda image: f"{_lcs_number(image) // 10_000:05d}/{_lcs_number(image):09d}.jpg",
    _caption,
    lambda number, image: f"{_lcs_number(image):09d}",
)
INSTRUCT = (
    Source("llava_instruct", 157_712, COCO_IMAGES, _coco, _llava_instruct, _coco_id),
    Source(
        "vqav2",
        82_783,
        COCO_IMAGES,
        _coco,
        Dialogue(between(2, 9), between(4, 9), between(1, 2), SHORT),
        _coco_id,
        20_011,
    ),
    Source(
        "okvqa",
        8_998,
        COCO_IMAGES,
        _coco,
        Dialogue(between(1, 2), between(6, 12), between(1, 2), SHORT),
        _coco_id,
        50_021,
    ),
    Source(
        "aokvqa",
        66_160,
        COCO_IMAGES,
        _coco,
        Dialogue(between(1, 1), between(18, 30), between(1, 1), SHORT),
        _coco_id,
        3_001,
    ),
    Source(
        "refcoco",
        48_447,
        COCO_IMAGES,
        _coco,
        lambda generator: _boxes(generator, generator.randint(2, 12), True),
        _coco_id,
        77_003,
    ),
    Source(
        "gqa",
        72_140,
        72_140,
        lambda image: f"gqa/images/{2_300_000 + image}.jpg",
        Dialogue(between(3, 24), between(5, 14), between(1, 2), SHORT),
    ),
    Source(
        "ocr_vqa",
        80_000,
        80_000,
        lambda image: f"ocr_vqa/images/{780_000_000 + image * 7:010d}.jpg",
        Dialogue(between(3, 7), between(5, 9), between(1, 9), SHORT),
        lambda number, image: f"{780_000_000 + image * 7:010d}",
    ),
    Source(
        "textcaps",
        21_953,
        21_953,
        lambda image: f"textvqa/train_images/{0xACE * (image + 1):016x}.jpg",
        Dialogue(between(1, 1), between(14, 40), between(8, 18)),
        lambda number, image: f"{0xACE * (image + 1):016x}",
    ),
    Source(
        "vg",
        86_417,
        86_417,
        _vg,
        lambda generator: _boxes(generator, generator.randint(4, 16), generator.random() < 0.5),
        lambda number, image: 2_300_000 + image,
    ),
    Source(
        "sharegpt",
        40_688,
        0,
        lambda image: "",
        Dialogue(about(3, 0.7, 24), about(25, 1.1, 1_500), about(210, 0.6, 1_500)),
        lambda number, image: f"chat{number:06d}_{number % 7}",
    ),
)
