"""MMMU: college exam questions with images anywhere in the text; multiple choice and open."""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.mmmu_answers import matches_open, parse_choice, parse_open
from morebench.evaluation.tasks.benchmark import (
    IMAGE_TOKEN,
    LETTERS,
    RANDOM_FALLBACK,
    SHORT_ANSWER,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    lettered,
    mean,
    with_image_tokens,
)

_MARK = re.compile(r"<image ([0-9]+)>")
_ID = re.compile(r"[^_]*_(.+)_[0-9]+")
_DECIMALS = {Profile.paper: 3, Profile.lmms_eval_0_7_3: 5}

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine "
    "Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}


class MMMU(Benchmark):
    fields = ("id", "question", "options", "answer", "question_type")
    unique = "id"

    def question(self, record: Record, profile: Profile) -> Question:
        is_paper = profile is Profile.paper
        if _is_choice(record):
            lines = [record["question"], lettered(_options(record))]
            possessive = "" if is_paper else "'s"
            instruction = f"Answer with the option{possessive} letter from the given choices directly."
        else:
            lines, instruction = [record["question"]], SHORT_ANSWER
        text = "\n".join([*lines, instruction] if is_paper else [*lines, "", instruction])
        marks = [f"image_{number}" for number in _MARK.findall(text)]
        if is_paper:
            return Question(_MARK.sub(IMAGE_TOKEN, text), tuple(marks))
        return with_image_tokens(text, sorted(set(marks)), profile)

    def target(self, record: Record) -> str | list[str]:
        _subject(record)
        answer = _answer(record)
        if _is_choice(record) and answer not in (*LETTERS[: len(_options(record))],):
            count = len(_options(record))
            raise DataError(f"answer must be the letter of one of {count} options, found {answer!r}")
        return answer

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer, target = prediction.strip(), _answer(record)
        subject = _subject(record)
        if not _is_choice(record):
            candidates = parse_open(answer)
            parsed = " | ".join(map(str, candidates))
            right = matches_open(candidates, [target] if isinstance(target, str) else target)
            return Scored(float(right), parsed, record={"subject": subject})
        options = _options(record)
        letter = parse_choice(answer, options)
        return Scored(
            float(letter == target),
            parsed=letter,
            flags=() if letter else (UNPARSED, RANDOM_FALLBACK),
            record={"subject": subject, "target": target, "num_options": len(options)},
        )

    def settle(
        self,
        items: Sequence[Scored],
        answered: Sequence[tuple[str, Record]],
        profile: Profile,
        replies: Path | None = None,
    ) -> list[Scored]:
        """An unreadable multiple-choice answer becomes a seeded guess, as in the reference."""
        generator = random.Random(0)
        settled = []
        for item in items:
            if RANDOM_FALLBACK in item.flags:
                letter = generator.choice(LETTERS[: item.record["num_options"]])
                item = replace(item, score=float(letter == item.record["target"]), parsed=letter)
            settled.append(item)
        return settled

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        decimals = _DECIMALS[profile]
        subjects: dict[str, list[float]] = {}
        for item in items:
            subjects.setdefault(item.record["subject"], []).append(item.score)
        domains = {
            domain: {name: subjects[name] for name in names.split() if name in subjects}
            for domain, names in DOMAINS.items()
        }
        return {
            "mmmu_acc": round(_pooled(subjects), decimals),
            "random_guesses": float(sum(RANDOM_FALLBACK in item.flags for item in items)),
            **{f"by_domain/{name}": round(_pooled(part), decimals) for name, part in domains.items() if part},
            **{f"by_subject/{name}": round(mean(part), decimals) for name, part in sorted(subjects.items())},
        }


def _pooled(subjects: Mapping[str, Sequence[float]]) -> float:
    """The mean, summed subject by subject like the reference: what is rounded next may end in a half."""
    total = sum(mean(scores) * len(scores) for scores in subjects.values())
    return total / max(1, sum(len(scores) for scores in subjects.values()))


def _answer(record: Record) -> str | list[str]:
    """The hub has three open answers of several values, as the text of a list: for the reference one text."""
    answer = record["answer"]
    return [str(one) for one in answer] if isinstance(answer, list) else str(answer)


def _subject(record: Record) -> str:
    if not (match := _ID.fullmatch(str(record["id"]))):
        raise DataError(f"id must be SPLIT_SUBJECT_NUMBER, found {record['id']!r}")
    return match[1]


def _is_choice(record: Record) -> bool:
    return bool(record["question_type"] == "multiple-choice")


def _options(record: Record) -> list[str]:
    """The hub stores the list as the text of a Python list."""
    options = record["options"]
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (SyntaxError, ValueError) as error:
            raise DataError(f"options must be the text of a list, found {options!r}") from error
    return [str(option) for option in options]
