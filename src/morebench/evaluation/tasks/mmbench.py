"""MMBench: every question is asked once per rotation of its options and counts only if all are right."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from morebench.config.schema import Profile
from morebench.errors import ConfigError, DataError
from morebench.evaluation.tasks.benchmark import (
    LETTER_ANSWER,
    Benchmark,
    Question,
    Record,
    Scored,
    mean,
    with_image_tokens,
)

_INSTRUCTIONS = {"en": LETTER_ANSWER, "cn": "请直接使用所提供的选项字母作为答案回答。"}
_JUDGES = ("none", "lmms_random")
_NEEDS_JUDGE = "needs_judge"
_MISSING = "nan"
_ROTATION = 1_000_000  # rotation k of question `base` is the row base + k * 1,000,000
_RANDOM_SEED = 2680
_DECORATIONS: tuple[tuple[str, str], ...] = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
)
_DECORATIONS += ((":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))


class MMBench(Benchmark):
    """`judge` decides rows without a readable letter: `none` counts them as wrong; `lmms_random` draws a
    letter as lmms-eval does when its judge cannot be reached."""

    fields = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category")
    unique = "index"
    instead_of_null = tuple((field, _MISSING) for field in ("hint", "A", "B", "C", "D"))

    def __init__(self, language: str, judge: str = "none"):
        if language not in _INSTRUCTIONS:
            raise ConfigError(f"language must be one of {', '.join(_INSTRUCTIONS)}, found {language!r}")
        if judge not in _JUDGES:
            raise ConfigError(f"judge must be one of {', '.join(_JUDGES)}, found {judge!r}")
        self.language = language
        self.judge = judge

    def question(self, record: Record, profile: Profile) -> Question:
        # The reference drops a hint "nan" in English only; Chinese prompts without a hint begin with it.
        hint = record["hint"] or ""
        if hint == _MISSING and self.language == "en":
            hint = ""
        options = "\n".join(f"{letter}. {record[letter]}" for letter in "ABCD" if record[letter] != _MISSING)
        header = f"{hint} {record['question']}" if hint else record["question"]
        text = f"{header} There are several options:\n{options}\n\n{_INSTRUCTIONS[self.language]}"
        return with_image_tokens(text, ("image",), profile)

    def target(self, record: Record) -> str:
        answer = record["answer"]
        if answer not in tuple("ABCD") or record[answer] == _MISSING:
            raise DataError(f"answer must be the letter of one of the options, found {answer!r}")
        return str(answer)

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        target = self.target(record)
        letter = resolve(prediction.strip(), {letter: str(record[letter]) for letter in "ABCD"})
        return Scored(
            float(letter == target),
            parsed=letter,
            flags=() if letter else (_NEEDS_JUDGE,),
            record={
                "index": int(record["index"]),
                "answer": target,
                "category": record["category"],
                "l2_category": record.get("L2-category", ""),
            },
        )

    def settle(self, items: Sequence[Scored], profile: Profile) -> list[Scored]:
        if self.judge == "none":
            return list(items)
        generator = random.Random(_RANDOM_SEED)
        settled = list(items)
        for rows in _questions(items):
            if any(not items[row].score for row in rows if _NEEDS_JUDGE not in items[row].flags):
                continue
            for row in rows:
                if _NEEDS_JUDGE in items[row].flags:
                    letter = "ABCDE"[generator.randint(0, 4)]
                    right = letter == items[row].record["answer"]
                    settled[row] = replace(items[row], score=float(right), parsed=letter)
                    if not right:
                        break
        return settled

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        scores: list[float] = []
        by_category: dict[str, list[float]] = defaultdict(list)
        for rows in _questions(items):
            first = items[rows[0]].record
            scores.append(float(all(items[row].score for row in rows)))
            for name in filter(None, (first["category"], first["l2_category"])):
                by_category[name].append(scores[-1])
        return {
            "gpt_eval_score": 100 * mean(scores),
            "unresolved_rows": float(sum(_NEEDS_JUDGE in item.flags for item in items)),
            **{name: mean(values) for name, values in by_category.items()},
        }


def _questions(items: Sequence[Scored]) -> list[list[int]]:
    """Positions in `items` of each question's rotations, questions and rotations in ascending index."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(items)), key=lambda row: items[row].record["index"]):
        groups[items[row].record["index"] % _ROTATION].append(row)
    return [groups[base] for base in sorted(groups)]


def resolve(response: str, options: dict[str, str]) -> str | None:
    """The option a response names, by letter (A to E) or else by text; None if not exactly one."""
    return _by_letter(response) or _by_text(response, options)


def _by_letter(response: str) -> str | None:
    if "Failed to obtain answer via API" in response:
        return None
    words = response.split()
    plain = [letter for letter in "ABCDE" if letter in words]
    # In a sentence "A" is an article.
    if len(plain) == 1 and not (plain == ["A"] and len(words) > 3):
        return plain[0]
    for before, after in _DECORATIONS:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return None


def _by_text(response: str, options: dict[str, str]) -> str | None:
    # The text of a missing option, "nan", takes part, as in the reference.
    found = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return found[0] if len(found) == 1 else None
