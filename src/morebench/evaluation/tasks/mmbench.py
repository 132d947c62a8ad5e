"""MMBench: every question is asked once per rotation of its options and counts only if all are right."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

from morebench.config.schema import Profile
from morebench.errors import ConfigError, DataError
from morebench.evaluation.judge import Endpoint, Replies
from morebench.evaluation.mmbench_letters import LETTERS, NO_OPTION, guess_letter, resolve
from morebench.evaluation.tasks.benchmark import (
    LETTER_ANSWER,
    NEEDS_JUDGE,
    RANDOM_FALLBACK,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    by_part,
    mean,
    with_image_tokens,
)

_INSTRUCTIONS = {"en": LETTER_ANSWER, "cn": "请直接使用所提供的选项字母作为答案回答。"}
_JUDGES = ("none", "lmms_random", "static", "openai")
_MISSING = (None, "", "nan")
_ROTATION = 1_000_000  # rotation k of question `base` is the row base + k * 1,000,000
_RANDOM_SEED = 2680
_ROUNDS = 3  # times a judge is asked about one answer until its reply can be read
_UNPARSED_SHARE = 0.01  # of rows; more than this deserves a warning

_JUDGE_PROMPT = """\
Somebody answered a multiple-choice question in their own words. Say which option the answer means.
Reply with one capital letter and nothing else: A, B, C or D, or E if the answer means none of the options.

Question: Which animal sits on the chair?
A. a grey cat
B. a parrot
C. a small dog
D. a hamster
Answer: It looks like a kitten.
Reply: A

Question: What colour is the door?
A. red
B. blue
C. green
D. white
Answer: The door is yellow.
Reply: E

Question: {question}
{options}
Answer: {answer}
Reply:"""

# Rows (positions in a task) -> the letter of each, None where none can be read.
_LettersOf = Callable[[Sequence[int]], Sequence[str | None]]


class MMBench(Benchmark):
    """`judge` decides rows that no rule reads, where they would decide their question:

    none: they are wrong. lmms_random: a letter is drawn, as lmms-eval does when its judge is out of reach.
    static: lmms-eval 0.7.3's rules without a judge. openai: `judge_model` at `judge_url` is asked.
    """

    fields = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category")
    unique = "index"
    instead_of_null: ClassVar[Mapping[str, str]] = dict.fromkeys(("hint", "A", "B", "C", "D"), "nan")

    def __init__(
        self, language: str, judge: str = "none", judge_url: str | None = None, judge_model: str | None = None
    ):
        if language not in _INSTRUCTIONS:
            raise ConfigError(f"language must be one of {', '.join(_INSTRUCTIONS)}, found {language!r}")
        if judge not in _JUDGES:
            raise ConfigError(f"judge must be one of {', '.join(_JUDGES)}, found {judge!r}")
        if judge == "openai" and not (judge_url and judge_model):
            raise ConfigError(
                f"judge openai needs judge_url and judge_model, found {judge_url!r} and {judge_model!r}. For "
                "example judge_url=https://api.openai.com/v1 judge_model=gpt-3.5-turbo."
            )
        self.language = language
        self.judge = judge
        self.endpoint = Endpoint(str(judge_url), str(judge_model)) if judge == "openai" else None

    def question(self, record: Record, profile: Profile) -> Question:
        # The reference drops a hint "nan" in English only; Chinese prompts without a hint begin with it.
        hint = record["hint"]
        without = hint is None or (hint == "nan" and self.language == "en")
        header = record["question"] if without else f"{hint} {record['question']}"
        options = "\n".join(["There are several options:", *_shown_options(record)]).rstrip("\n")
        text = f"{header} {options}\n\n{_INSTRUCTIONS[self.language]}"
        return with_image_tokens(text, ("image",), profile)

    def target(self, record: Record) -> str:
        answer = record["answer"]
        if answer not in (*LETTERS,) or record[answer] in _MISSING:
            raise DataError(f"answer must be the letter of one of the options, found {answer!r}")
        return str(answer)

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        target = str(record["answer"])
        letter = resolve(prediction.strip(), _options(record))
        return Scored(
            float(letter == target),
            parsed=letter,
            flags=() if letter else (UNPARSED,),
            record={
                "index": int(record["index"]),
                "answer": target,
                "category": record["category"],
                "l2_category": record.get("L2-category", ""),
            },
        )

    def settle(
        self,
        items: Sequence[Scored],
        answered: Sequence[tuple[str, Record]],
        profile: Profile,
        replies: Path | None = None,
    ) -> list[Scored]:
        settled = list(items)
        open_rows = [
            [row for row in rows if items[row].parsed is None]
            for rows in _questions(items)
            if all(items[row].score for row in rows if items[row].parsed is not None)
        ]
        for row in (row for rows in open_rows for row in rows):
            settled[row] = replace(items[row], flags=(UNPARSED, NEEDS_JUDGE))
        if self.judge == "none":
            return settled
        letters_of = self._reader(answered, replies)
        # A draw depends on those before it, so questions go one after another; else all go side by side.
        for questions in [[rows] for rows in open_rows] if self.judge == "lmms_random" else [open_rows]:
            self._decide(settled, questions, letters_of)
        return settled

    def _decide(
        self, settled: list[Scored], questions: Sequence[Sequence[int]], letters_of: _LettersOf
    ) -> None:
        """`questions`: the open rows of each. Leaves one at its first wrong row, like the reference."""
        flags = (UNPARSED, RANDOM_FALLBACK) if self.judge == "lmms_random" else (UNPARSED,)
        wrong: set[int] = set()
        for wave in zip_longest(*questions):
            asked = [(q, row) for q, row in enumerate(wave) if row is not None and q not in wrong]
            letters = letters_of([row for _, row in asked])
            for (q, row), letter in zip(asked, letters, strict=True):
                right = letter == settled[row].record["answer"]
                if not right:
                    wrong.add(q)
                if letter is None:
                    continue
                settled[row] = replace(settled[row], score=float(right), parsed=letter, flags=flags)
                for rest in questions[q] if not right else ():
                    if settled[rest].parsed is None:
                        settled[rest] = replace(settled[rest], flags=(UNPARSED,))

    def _reader(self, answered: Sequence[tuple[str, Record]], path: Path | None) -> _LettersOf:
        if self.endpoint is not None:
            return partial(_judged, Replies(self.endpoint, path), answered)
        if self.judge == "static":
            return lambda rows: [guess_letter(answered[row][0]) for row in rows]
        generator = random.Random(_RANDOM_SEED)
        letters = LETTERS + NO_OPTION
        return lambda rows: [letters[generator.randint(0, len(letters) - 1)] for _ in rows]

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        rows_of = _questions(items)
        right = [
            replace(items[rows[0]], score=float(all(items[row].score for row in rows))) for rows in rows_of
        ]
        parts = by_part("by_category", right, "category") | by_part("by_l2_category", right, "l2_category")
        return {
            "gpt_eval_score": 100 * mean(question.score for question in right),
            "unresolved_rows": float(sum(UNPARSED in item.flags for item in items)),
            **{name: mean(question.score for question in part) for name, part in parts.items()},
        }

    def warnings(self, items: Sequence[Scored]) -> list[str]:
        count = sum(UNPARSED in item.flags for item in items)
        if count <= _UNPARSED_SHARE * len(items):
            return []
        return [
            f"{count} of {len(items)} answers ({count / len(items):.1%}) name no option by MMBench's rules, "
            f"more than {_UNPARSED_SHARE:.0%}: the score depends on judge={self.judge}."
        ]


def _judged(
    replies: Replies, answered: Sequence[tuple[str, Record]], rows: Sequence[int]
) -> list[str | None]:
    letters: dict[int, str | None] = dict.fromkeys(rows)
    for turn in range(_ROUNDS):
        unread = [row for row in rows if letters[row] is None]
        said = replies.ask([_judge_prompt(*answered[row]) for row in unread], turn)
        for row, reply in zip(unread, said, strict=True):
            letters[row] = resolve(reply, _options(answered[row][1]))
    return [letters[row] for row in rows]


def _judge_prompt(answer: str, record: Record) -> str:
    options = "\n".join(_shown_options(record))
    return _JUDGE_PROMPT.format(question=f"{record['question']}?", options=options, answer=answer.strip())


def _options(record: Record) -> dict[str, str]:
    return {letter: str(record[letter]) for letter in LETTERS if record[letter] is not None}


def _shown_options(record: Record) -> list[str]:
    return [f"{letter}. {record[letter]}" for letter in LETTERS if record[letter] not in _MISSING]


def _questions(items: Sequence[Scored]) -> list[list[int]]:
    """Positions in `items` of each question's rotations, questions and rotations in ascending index."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(items)), key=lambda row: items[row].record["index"]):
        groups[items[row].record["index"] % _ROTATION].append(row)
    return [groups[base] for base in sorted(groups)]
