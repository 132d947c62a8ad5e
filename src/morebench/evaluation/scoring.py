"""From predictions to scores: pure functions of text, and the pass over a whole task."""

import re
import string
from collections.abc import Iterable

from morebench.config.schema import Profile
from morebench.evaluation.tasks.benchmark import Benchmark, Record, Scored

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_REASONING = re.compile(r"<think>.*?</think>|<analysis>.*?</analysis>", re.DOTALL)


def score_items(
    benchmark: Benchmark, answered: Iterable[tuple[str, Record]], profile: Profile
) -> list[Scored]:
    """`answered`: (prediction, record) of every item of a task, in record order."""
    items = [
        benchmark.score(without_reasoning(prediction, profile), record, profile)
        for prediction, record in answered
    ]
    return benchmark.settle(items, profile)


def without_reasoning(prediction: str, profile: Profile) -> str:
    return prediction if profile is Profile.paper else _REASONING.sub("", prediction)


def exact_match(prediction: str, target: str) -> float:
    """Case and ASCII punctuation ignored; articles, number words and inner spaces are not."""
    return float(_bare(prediction) == _bare(target))


def _bare(text: str) -> str:
    # The reference compares numpy strings, which lose NUL characters at their end.
    return text.lower().translate(_DELETE_PUNCTUATION).rstrip("\0")
