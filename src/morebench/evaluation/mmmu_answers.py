"""How MMMU reads an answer out of a response, as lmms-eval does it."""

import re
from collections.abc import Sequence

from morebench.evaluation.tasks.benchmark import LETTERS

_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_MIN_WORDS = 5  # option texts are looked for only in responses longer than this


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """The letter a response chooses; None if nothing can be read."""
    for character in ",.!?;:'":
        response = response.strip(character)
    text = f" {response} "
    letters = LETTERS[: len(options)]
    lowered = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}

    def last(pattern: str) -> dict[str, int]:
        return {letter: text.rfind(pattern.format(letter)) for letter in letters}

    bracketed = {letter: at for letter, at in last("({})").items() if at >= 0}
    if bracketed:
        return _latest(bracketed)
    for pattern in ("{} ", "{}."):
        if found := [letter for letter, at in last(pattern).items() if at >= 0]:
            # Both are ranked by the position of the letter between spaces, -1 where there is none.
            between_spaces = last(" {} ")
            return _latest({letter: between_spaces[letter] for letter in found})
    if len(text.split()) > _MIN_WORDS:
        named = {letter: text.lower().rfind(option) for letter, option in lowered.items()}
        named = {letter: at for letter, at in named.items() if at >= 0}
        return _latest(named) if named else None
    return None


def _latest(positions: dict[str, int]) -> str:
    return max(positions, key=lambda letter: positions[letter])  # the first letter wins a tie


def parse_open(response: str) -> list[str | float]:
    """Everything in an open response that may be the answer: tails of its lines and the numbers in them."""
    text = response.strip().strip(".").lower()
    keys = _tails(text) or [text]
    candidates = [*keys, *(number for key in keys for number in _numbers(key))]
    return sorted({form for candidate in candidates for form in _forms(candidate)}, key=str)


def matches_open(candidates: Sequence[str | float], targets: Sequence[str]) -> bool:
    """Whether one of the targets is among the candidates, or inside one of them."""
    forms = [form for target in targets for form in _forms(target)]
    texts = [form for form in forms if isinstance(form, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in forms
        for candidate in candidates
    )


def _tails(text: str) -> list[str]:
    """What follows "so", "is", "answer" and the like, the shortest of each line."""
    tails = []
    lines = text.split("\n")
    for i, line in enumerate(lines):
        shortest = ""
        for indicator in (*_INDICATORS, "=") if i == len(lines) - 1 else _INDICATORS:
            tail = line.rpartition(indicator)[2].strip()
            # An empty tail wipes what was found before it; the next one starts afresh.
            if indicator in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails


def _numbers(text: str) -> list[str]:
    return [number for pattern in (_GROUPED, _SCIENTIFIC, _SIMPLE) for number in pattern.findall(text)]


def _forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # A single character would be found inside any word, so it is looked for beside a space.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
