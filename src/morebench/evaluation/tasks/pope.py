"""POPE: is the object in the image? Balanced yes/no questions; the number reported is the F1 of yes."""

from collections.abc import Sequence

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.tasks.benchmark import (
    SHORT_ANSWER,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    by_part,
    mean,
    with_image_tokens,
)


class POPE(Benchmark):
    fields = ("question", "answer")

    def question(self, record: Record, profile: Profile) -> Question:
        return with_image_tokens(f"{record['question'].strip()}\n{SHORT_ANSWER}", ("image",), profile)

    def target(self, record: Record) -> str:
        answer = str(record["answer"]).lower().strip()
        if answer not in ("yes", "no"):
            raise DataError(f"answer must be yes or no, found {record['answer']!r}")
        return answer

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        answer, target = prediction.lower().strip(), self.target(record)
        return Scored(
            float(answer == target),
            parsed=answer,
            flags=() if answer in ("yes", "no") else (UNPARSED,),
            record={"answer": target, "category": record.get("category", "")},
        )

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        """`yes_ratio` is that of the right answers. The mean of the categories' F1 is what LLaVA reports."""
        parts = {name: _values(part) for name, part in by_part("by_category", items, "category").items()}
        pooled = _values(items)
        return {
            **pooled,
            "pope_f1_mean_of_categories": mean(v["f1"] for v in parts.values()) if parts else pooled["f1"],
            **{f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()},
        }


def _values(items: Sequence[Scored]) -> dict[str, float]:
    """An answer that is neither yes nor no is in no count, so it costs accuracy but never recall."""
    outcomes = [(item.record["answer"], item.parsed) for item in items]
    counted = (("yes", "yes"), ("no", "yes"), ("yes", "no"))  # (answer, prediction)
    hits, false_alarms, misses = (outcomes.count(pair) for pair in counted)
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "accuracy": mean(item.score for item in items),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": mean(float(item.record["answer"] == "yes") for item in items),
    }
