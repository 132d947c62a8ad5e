"""TextVQA: read the text in the image; ten annotators, soft accuracy."""

from morebench.config.schema import Profile
from morebench.evaluation.tasks.benchmark import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    Scored,
    mean,
    with_image_tokens,
)
from morebench.evaluation.vqa_answers import normalise

_FULL_AGREEMENT = 3  # other annotators with the same answer that give the full score


class TextVQA(Benchmark):
    fields = ("question", "answers", "ocr_tokens", "question_id")
    unique = "question_id"

    def question(self, record: Record, profile: Profile) -> Question:
        text = str(record["question"]).capitalize()
        if profile is Profile.paper:
            text += f"\nReference OCR token: {', '.join(record['ocr_tokens'])}"
        return with_image_tokens(f"{text}\n{SHORT_ANSWER}", ("image",), profile)

    def target(self, record: Record) -> list[str]:
        return list(record["answers"] or [])

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer = normalise(prediction.strip())
        same = [normalise(given) == answer for given in self.target(record)]
        soft = mean(min(1.0, (sum(same) - own) / _FULL_AGREEMENT) for own in same)
        return Scored(soft, parsed=answer)
