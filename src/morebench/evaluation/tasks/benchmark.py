"""What every benchmark gives: a question, a target, a score per item, metrics over items."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from morebench.config.schema import Profile

Record = Mapping[str, Any]

IMAGE_TOKEN = "<image>"
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """`images`: record fields, one per image token of `text`, in order; `field[i]` is one image of a list."""

    text: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """One answered item. `record` holds what `aggregate` needs to know of the item, nothing else."""

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

    @abstractmethod
    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        """`prediction` is the text as generated."""

    def settle(self, items: Sequence[Scored], profile: Profile) -> list[Scored]:
        """Decide what one item alone cannot (a guess, a judge). `items` come in record order."""
        return list(items)

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        return {"exact_match": mean(item.score for item in items)}


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


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
