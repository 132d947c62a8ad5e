"""MME: two yes/no questions about each image; a category is worth 200 points."""

from collections import defaultdict
from collections.abc import Sequence

from morebench.config.schema import Profile
from morebench.errors import DataError, join_problems
from morebench.evaluation.tasks.benchmark import (
    SHORT_ANSWER,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    mean,
    with_image_tokens,
)

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION: tuple[str, ...] = ("existence", "count", "position", "color", "posters")
PERCEPTION += ("celebrity", "scene", "landmark", "artwork", "OCR")


class MME(Benchmark):
    fields = ("question_id", "question", "answer", "category")

    def question(self, record: Record, profile: Profile) -> Question:
        text = record["question"].strip().replace(" Please answer yes or no.", "")
        return with_image_tokens(f"{text}\n{SHORT_ANSWER}", ("image",), profile)

    def target(self, record: Record) -> str:
        if record["category"] not in COGNITION + PERCEPTION:
            raise DataError(f"category must be one of MME's 14, found {record['category']!r}")
        answer = str(record["answer"]).lower().strip().replace(".", "")
        if answer not in ("yes", "no"):
            raise DataError(f"answer must be Yes or No, found {record['answer']!r}")
        return answer

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        label = _label(prediction.lower().strip().replace(".", ""), profile)
        return Scored(
            float(label == self.target(record)),
            parsed=label,
            flags=(UNPARSED,) if label == "other" else (),
            record={"question_id": record["question_id"], "category": record["category"]},
        )

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        images: dict[tuple[str, str], list[float]] = defaultdict(list)
        for item in items:
            record = item.record
            images[record["category"], record["question_id"]].append(item.score)
        if odd := [
            f"{name}: {len(scores)} answers" for (_, name), scores in images.items() if len(scores) != 2
        ]:
            raise DataError("MME asks two questions about each image, but these have\n" + join_problems(odd))
        by_category: dict[str, list[float]] = defaultdict(list)
        for (category, _), (first, second) in images.items():
            by_category[category].append(50 * (first + second) + 100 * first * second)
        values = {category: mean(points) for category, points in sorted(by_category.items())}
        return {
            "mme_perception_score": sum(values.get(category, 0.0) for category in PERCEPTION),
            "mme_cognition_score": sum(values.get(category, 0.0) for category in COGNITION),
            **{f"by_category/{category}": value for category, value in values.items()},
        }


def _label(answer: str, profile: Profile) -> str:
    if answer in ("yes", "no"):
        return answer
    if profile is Profile.lmms_eval_0_7_3 and len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "other")
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
