"""AI2D: multiple choice about science diagrams, answered with a letter."""

import re

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.scoring import exact_match
from morebench.evaluation.tasks.benchmark import (
    LETTER_ANSWER,
    LETTERS,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    lettered,
    with_image_tokens,
)

_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")


class AI2D(Benchmark):
    fields = ("question", "options", "answer")

    def question(self, record: Record, profile: Profile) -> Question:
        text = f"{record['question']}\n{lettered(record['options'])}\n{LETTER_ANSWER}"
        return with_image_tokens(text, ("image",), profile)

    def target(self, record: Record) -> str:
        answer, count = str(record["answer"]), len(record["options"])
        if not answer.isdecimal() or int(answer) >= count:
            raise DataError(f"answer must be an index of `options`, 0 to {count - 1}, found {answer!r}")
        return LETTERS[int(answer)]

    def filtered(self, prediction: str, profile: Profile) -> str:
        if profile is Profile.lmms_eval_0_7_3 and (leading := _LEADING_LETTER.match(prediction)):
            return leading[1]
        return prediction

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer = prediction.strip()
        readable = any(exact_match(answer, letter) for letter in LETTERS[: len(record["options"])])
        return Scored(exact_match(answer, self.target(record)), answer, flags=() if readable else (UNPARSED,))
