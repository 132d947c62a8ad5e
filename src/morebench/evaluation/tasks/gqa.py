"""GQA: open questions with one-word answers."""

from morebench.config.schema import Profile
from morebench.evaluation.scoring import exact_match
from morebench.evaluation.tasks.benchmark import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    Scored,
    with_image_tokens,
)


class GQA(Benchmark):
    fields = ("question", "answer", "id")
    unique = "id"

    def question(self, record: Record, profile: Profile) -> Question:
        return with_image_tokens(f"{record['question']}\n{SHORT_ANSWER}", ("image",), profile)

    def target(self, record: Record) -> str:
        return str(record["answer"])

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer = prediction.strip()
        return Scored(exact_match(answer, self.target(record)), parsed=answer)
