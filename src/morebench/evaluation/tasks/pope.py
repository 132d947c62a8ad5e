"""POPE: is the object in the image? Balanced yes/no questions; the number reported is the F1 of yes."""

from collections.abc import Sequence

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


class POPE(Benchmark):
    fields = ("question", "answer")

    def question(self, record: Record, profile: Profile) -> Question:
        return with_image_tokens(f"{record['question'].strip()}\n{SHORT_ANSWER}", ("image",), profile)

    def target(self, record: Record) -> str:
        return str(record["answer"]).lower().strip()

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer, target = prediction.lower().strip(), self.target(record)
        return Scored(
            float(answer == target),
            parsed=answer,
            flags=() if answer in ("yes", "no") else ("unparsed",),
            record={"answer": target, "category": record.get("category", "")},
        )

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        categories = sorted({item.record["category"] for item in items})
        by_category = [[item for item in items if item.record["category"] == name] for name in categories]
        precision, recall, f1 = _precision_recall_f1(items)
        return {
            "accuracy": mean(item.score for item in items),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": mean(float(item.record["answer"] == "yes") for item in items),
            "pope_f1_mean_of_categories": mean(_precision_recall_f1(group)[2] for group in by_category),
        }


def _precision_recall_f1(items: Sequence[Scored]) -> tuple[float, float, float]:
    """An answer that is neither yes nor no is in no count, so it costs accuracy but never recall."""
    outcomes = [(item.record["answer"], item.parsed) for item in items]
    counted = (("yes", "yes"), ("no", "yes"), ("yes", "no"))  # (answer, prediction)
    hits, false_alarms, misses = (outcomes.count(pair) for pair in counted)
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1
