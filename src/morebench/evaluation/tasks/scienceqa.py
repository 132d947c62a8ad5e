"""ScienceQA, the questions with an image: multiple choice, some with a hint."""

from morebench.config.schema import Profile
from morebench.errors import DataError
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


class ScienceQA(Benchmark):
    fields = ("question", "choices", "answer", "hint")
    instead_of_null = (("hint", ""),)

    def question(self, record: Record, profile: Profile) -> Question:
        context = f"Context: {record['hint']}\n" if record["hint"] else ""
        text = f"{context}{record['question']}\n{lettered(record['choices'])}\n{LETTER_ANSWER}"
        return with_image_tokens(text, ("image",), profile)

    def target(self, record: Record) -> str:
        answer, count = record["answer"], len(record["choices"])
        if not isinstance(answer, int) or not 0 <= answer < count:
            raise DataError(f"answer must be an index of `choices`, 0 to {count - 1}, found {answer!r}")
        return LETTERS[answer]

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer, target = prediction.strip(), self.target(record)
        # "B. soft" counts as B; the capital is demanded even where case is ignored.
        parsed = answer[0] if len(answer) >= 2 and answer[0].isupper() and answer[1] == "." else answer
        fold = str if profile is Profile.paper else str.lower
        readable = fold(parsed) in map(fold, LETTERS[: len(record["choices"])])
        return Scored(float(fold(parsed) == fold(target)), parsed, flags=() if readable else (UNPARSED,))
