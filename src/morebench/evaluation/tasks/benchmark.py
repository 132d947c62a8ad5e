"""What every benchmark gives: a question, a target, a score per item, metrics over items."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from morebench.config.schema import Profile
from morebench.errors import DataError

Record = Mapping[str, Any]

IMAGE_TOKEN = "<image>"
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

UNPARSED = "unparsed"  # not what the task asks for: one of its letters, yes or no
NEEDS_JUDGE = "needs_judge"  # unparsed, and what it means would decide the item
RANDOM_FALLBACK = "random_fallback"  # a letter was drawn in its place


@dataclass(frozen=True)
class Question:
    """`images`: record fields, one per image token of `text`, in order; `field[i]` is one image of a list."""

    text: str
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        if (tokens := self.text.count(IMAGE_TOKEN)) != len(self.images):
            raise DataError(f"a question with {tokens} times {IMAGE_TOKEN} for {len(self.images)} image(s)")


@dataclass(frozen=True)
class Scored:
    """One answered item. `record` holds what `aggregate` needs to know of the item, nothing else.

    `parsed`: what was read out of the prediction, None if nothing. `flags`: UNPARSED and the like.
    """

    score: float
    parsed: str | None
    flags: tuple[str, ...] = ()
    record: Record = field(default_factory=dict)


class Benchmark(ABC):
    fields: ClassVar[tuple[str, ...]]
    """Record fields that cannot be missing or null, images aside."""
    unique: ClassVar[str | None] = None
    """The one of `fields` that no two records share, if there is one."""
    instead_of_null: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Field, and what the hub's data has in it where a copy may have null."""

    @abstractmethod
    def question(self, record: Record, profile: Profile) -> Question: ...

    @abstractmethod
    def target(self, record: Record) -> str | list[str]:
        """Raises DataError if the record has no usable answer."""

    def filtered(self, prediction: str, profile: Profile) -> str:
        """What the harness cuts out of the text as generated, before it takes reasoning off."""
        return prediction

    @abstractmethod
    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        """`prediction`: as `filtered` left it, without reasoning."""

    def settle(
        self,
        items: Sequence[Scored],
        answered: Sequence[tuple[str, Record]],
        profile: Profile,
        replies: Path | None = None,
    ) -> list[Scored]:
        """Decide what one item alone cannot (a guess, a judge). All in record order.

        `replies`: where a judge's replies are kept. Raises JudgeError.
        """
        return list(items)

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        """The task's numbers. A part of the task has a "/" in its name: `by_category/count`."""
        return {"exact_match": mean(item.score for item in items)}

    def warnings(self, items: Sequence[Scored]) -> list[str]:
        """What makes the numbers doubtful, a sentence each."""
        return []


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def by_part(prefix: str, items: Sequence[Scored], key: str) -> dict[str, list[Scored]]:
    """`{prefix}/{value}` -> the items whose record has this value at `key`; no part for those without."""
    parts: dict[str, list[Scored]] = {}
    for item in items:
        if (value := item.record.get(key)) not in (None, ""):
            parts.setdefault(f"{prefix}/{value}", []).append(item)
    return dict(sorted(parts.items()))


def with_image_tokens(text: str, images: Sequence[str], profile: Profile) -> Question:
    """The user message. Text that places its own image tokens stays as it is.

    The paper's harness puts one token in front however many images there are; images beyond the
    tokens never reach the LLM. lmms-eval 0.7.3 puts one per image.
    """
    if IMAGE_TOKEN not in text and images:
        tokens = [IMAGE_TOKEN] * (1 if profile is Profile.paper else len(images))
        text = " ".join(tokens) + "\n" + text
    return Question(text, tuple(images[: text.count(IMAGE_TOKEN)]))


def lettered(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
