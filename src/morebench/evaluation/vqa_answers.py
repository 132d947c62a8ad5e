"""The answer normaliser of the public VQA evaluation, as lmms-eval runs it (with its slips kept)."""

import re
from functools import lru_cache

from morebench.evaluation.contractions import CONTRACTIONS

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the reference passes a regex flag where the count belongs
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")


@lru_cache(maxsize=1 << 16)  # ten annotators mostly agree
def normalise(answer: str) -> str:
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    cleaned = text
    for character in _PUNCTUATION:
        # Decided on the text as it came: beside a space it vanishes, between letters it becomes one.
        beside_space = f"{character} " in text or f" {character}" in text
        cleaned = cleaned.replace(character, "" if beside_space else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", cleaned, count=_MAX_PERIODS)
