"""Answers that a score says nothing about, counted by kind, with examples. No torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from morebench.evaluation.tasks.benchmark import Scored

NUM_EXAMPLES = 5
_LONGEST_TEXT = 300  # characters of a question or an answer that an example shows

Line = Mapping[str, Any]

# Kind -> what it means.
KINDS = {
    "empty": "no text",
    "unparsed": "not what the task asks for",
    "too_long": "cut at max_new_tokens",
    "needs_judge": "what it means would decide the item, and no rule reads it",
    "random_fallback": "an answer was drawn, as the reference does",
    "unreadable_tokens": "with ids beyond the tokenizer's, which have no text",
    "near_ties": "two best tokens nearly equal, so that another batch may answer otherwise",
}
_IS: dict[str, Callable[[Line, Scored], bool]] = {
    "empty": lambda line, scored: not line["prediction"].strip(),
    "too_long": lambda line, scored: not line["ended"],
    "unreadable_tokens": lambda line, scored: line["unreadable_tokens"] > 0,
    "near_ties": lambda line, scored: line["near_ties"] > 0,
}


def anomalies(lines: Sequence[Line], scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Kind -> `n` items and the first `examples` of them; a kind that does not occur is left out.

    The other kinds are flags of the scorer.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        of_kind = _IS.get(kind, lambda line, item, kind=kind: kind in item.flags)
        which = [line for line, item in zip(lines, scored, strict=True) if of_kind(line, item)]
        if which:
            found[kind] = {"n": len(which), "examples": [_example(line) for line in which[:NUM_EXAMPLES]]}
    return found


def _example(line: Line) -> dict[str, Any]:
    return {
        "id": line["id"],
        "question": _short(line["question"]),
        "prediction": _short(line["prediction"]),
        "target": line["target"],
    }


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ... ({len(text)} characters)"
