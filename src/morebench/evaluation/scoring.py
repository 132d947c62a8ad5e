"""From predictions to scores: pure functions of text, and the pass over a whole task."""

import string
from collections.abc import Iterable
from pathlib import Path

from morebench.config.schema import Profile
from morebench.evaluation.tasks.benchmark import Benchmark, Record, Scored

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_REASONING_TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))


def score_items(
    benchmark: Benchmark,
    answered: Iterable[tuple[str, Record]],
    profile: Profile,
    replies: Path | None = None,
) -> list[Scored]:
    """`answered`: (prediction, record) of every item of a task, in record order.

    `replies`: a JSON-lines file of what a judge said, added to; what stands there is not asked again. Raises
    JudgeError where a judge is to be asked and can't be.
    """
    read = [
        (without_reasoning(benchmark.filtered(prediction, profile), profile), record)
        for prediction, record in answered
    ]
    items = [benchmark.score(prediction, record, profile) for prediction, record in read]
    return benchmark.settle(items, read, profile, replies)


def without_reasoning(prediction: str, profile: Profile) -> str:
    """lmms-eval 0.7.3 drops what stands between the tags, and all before a closing tag left over."""
    if profile is Profile.paper:
        return prediction
    for opening, closing in _REASONING_TAGS:
        while (start := prediction.find(opening)) >= 0 and (end := prediction.find(closing, start)) >= 0:
            prediction = prediction[:start] + prediction[end + len(closing) :]
        if opening not in prediction:
            prediction = prediction.rpartition(closing)[2]
    return prediction.strip()


def exact_match(prediction: str, target: str) -> float:
    """Case and ASCII punctuation ignored; articles, number words and inner spaces are not."""
    return float(_bare(prediction) == _bare(target))


def _bare(text: str) -> str:
    # The reference works on numpy strings: they lose NUL characters at their end and cannot grow, so a
    # character whose lower case is two ("İ") pushes others out.
    lower = text.rstrip("\0").lower()[: len(text)]
    return lower.translate(_DELETE_PUNCTUATION).rstrip("\0")
