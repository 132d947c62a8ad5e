from functools import partial
from math import comb

import numpy as np
import pytest

from morebench.config.schema import Profile
from morebench.evaluation.tasks.benchmark import Scored
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME
from morebench.evaluation.tasks.pope import POPE
from morebench.reporting.stats import (
    Interval,
    aggregate_intervals,
    f1_of,
    mean_of,
    metric_intervals,
    sums_interval,
)


def scored(score: float, parsed: str = "", **record: object) -> Scored:
    return Scored(score, parsed, (), record)


def mean_metric(items: list[Scored]) -> dict[str, float]:
    return {"exact_match": sum(item.score for item in items) / len(items)}


def pope_items(rng: np.random.Generator, num: int) -> list[Scored]:
    items = []
    for i in range(num):
        answer = "yes" if i % 2 else "no"
        said = answer if rng.random() < 0.8 else rng.choice(["yes", "no", "a cat"])
        items.append(scored(float(said == answer), str(said), answer=answer, category="random"))
    return items


def test_interval_of_two_images_by_hand():
    # Drawing 2 of {0, 1}: mean 0 with chance 1/4, 1/2 with 1/2, 1 with 1/4. Both tails hold more than 2.5 %.
    assert sums_interval(mean_of([0, 1]), ["a", "b"]) == Interval(0.0, 1.0)


def test_interval_of_a_coin_is_the_binomial_one():
    # 20 images, 10 right: a resample's count is binomial(20, 1/2); its 2.5 % and 97.5 % points are 6 and 14.
    cumulative = np.cumsum([comb(20, k) / 2**20 for k in range(21)])
    low, high = (int(np.searchsorted(cumulative, tail)) for tail in (0.025, 0.975))
    assert (low, high) == (6, 14)
    found = sums_interval(mean_of([0, 1] * 10), [str(i) for i in range(20)], resamples=20_000)
    assert (found.low, found.high) == pytest.approx((low / 20, high / 20))


def test_questions_of_an_image_stay_together():
    # 5 images of 4 questions that are all right or all wrong carry no more than 5 questions do.
    verdicts = [0, 1, 1, 0, 1]
    clustered = sums_interval(mean_of(np.repeat(verdicts, 4)), list(np.repeat([*"abcde"], 4)))
    assert clustered == sums_interval(mean_of(verdicts), [*"abcde"])
    loose = sums_interval(mean_of(np.repeat(verdicts, 4)), [str(i) for i in range(20)])
    assert loose.high - loose.low < 0.75 * (clustered.high - clustered.low)


def test_images_with_more_questions_weigh_more():
    # One image with 3 right answers, one with 1 wrong: drawing one of each gives 3/4, never 1/2.
    statistic = mean_of([1, 1, 1, 0])
    seen = set()
    for seed in range(40):
        interval = sums_interval(statistic, ["a", "a", "a", "b"], resamples=1, seed=seed)
        seen.add(interval.low)
    assert seen <= {0.0, 0.75, 1.0}
    assert 0.75 in seen


def test_all_right_is_not_certainty():
    # Clopper-Pearson for 10 of 10: the lower end solves p**10 = 0.025.
    found = sums_interval(mean_of([1.0] * 10), [str(i) for i in range(10)])
    assert found.high == 1.0
    assert found.low**10 == pytest.approx(0.025)
    assert sums_interval(mean_of([0.0] * 10), [str(i) for i in range(10)]) == Interval(0.0, 1 - found.low)


def test_f1_by_hand():
    # 2 hits, 1 false alarm, 1 miss; "maybe" is in no count: 4 / (4 + 1 + 1).
    answers = ["yes", "yes", "no", "yes", "no", "yes"]
    said = ["yes", "yes", "yes", "no", "no", "maybe"]
    assert f1_of(answers, said).value() == pytest.approx(2 / 3)
    assert f1_of(["no"], ["no"]).value() == 0.0


def test_f1_takes_the_fast_path_and_gives_what_the_aggregate_gives():
    items = pope_items(np.random.default_rng(0), 120)
    aggregate = partial(POPE().aggregate, profile=Profile.paper)
    images = [str(i // 3) for i in range(120)]
    calls = []

    def counted(chosen: list[Scored]) -> dict[str, float]:
        calls.append(len(chosen))
        return aggregate(chosen)

    fast = metric_intervals(counted, items, images, ["f1", "accuracy"])
    assert len(calls) == 4
    slow = aggregate_intervals(aggregate, items, images, resamples=2_000)
    for metric in ("f1", "accuracy"):
        assert (fast[metric].low, fast[metric].high) == pytest.approx((slow[metric].low, slow[metric].high))


def test_a_metric_that_only_looks_like_the_mean_is_aggregated():
    # The odd items score as the whole does, but they are half as many: their interval is wider.
    items = [scored(float(i < 20), part="odd" if i % 2 else "even") for i in range(40)]

    def odd(chosen: list[Scored]) -> dict[str, float]:
        return mean_metric([item for item in chosen if item.record["part"] == "odd"])

    assert odd(items) == mean_metric(items)
    images = [str(i) for i in range(40)]
    found = metric_intervals(odd, items, images, ["exact_match"])["exact_match"]
    pooled = sums_interval(mean_of([item.score for item in items]), images)
    assert found.high - found.low > 1.2 * (pooled.high - pooled.low)


def test_a_group_mean_needs_no_resampling_in_python():
    items = [scored(float(i % 3 > 0), kind="video" if i % 4 == 0 else "image") for i in range(200)]

    def video(chosen: list[Scored]) -> dict[str, float]:
        calls.append(len(chosen))
        return mean_metric([item for item in chosen if item.record["kind"] == "video"])

    calls: list[int] = []
    images = [str(i // 4) for i in range(200)]
    fast = metric_intervals(video, items, images, ["exact_match"])["exact_match"]
    assert len(calls) == 4
    slow = aggregate_intervals(video, items, images, resamples=2_000)["exact_match"]
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high))


def test_an_image_drawn_twice_is_two_images_to_an_aggregate_that_pairs():
    # MME refuses an image with four answers. Both answers right: 200 points; one: 50; none: 0.
    scores = {"a": (1, 1), "b": (1, 0), "c": (0, 0)}
    items = [
        scored(score, question_id=name, category="count") for name, pair in scores.items() for score in pair
    ]
    aggregate = partial(MME().aggregate, profile=Profile.paper)
    assert aggregate(items)["mme_perception_score"] == pytest.approx(250 / 3)
    images = [name for name in scores for _ in range(2)]
    slow = aggregate_intervals(aggregate, items, images, resamples=2_000)["mme_perception_score"]
    assert slow == Interval(0.0, 200.0)


def test_mme_takes_the_fast_path_to_the_same_interval():
    rng = np.random.default_rng(0)
    items = [
        scored(float(rng.random() < 0.7), question_id=f"{category} {image}", category=category)
        for category in ("count", "OCR", "code_reasoning")
        for image in range(12)
        for _ in range(2)
    ]
    images = [str(item.record["question_id"]) for item in items]
    calls: list[int] = []

    def aggregate(chosen: list[Scored]) -> dict[str, float]:
        calls.append(len(chosen))
        return MME().aggregate(chosen, Profile.paper)

    names = ["mme_perception_score", "mme_cognition_score"]
    fast = metric_intervals(aggregate, items, images, names)
    assert len(calls) == 4
    slow = aggregate_intervals(aggregate, items, images, resamples=2_000)
    for name in names:
        assert (fast[name].low, fast[name].high) == pytest.approx((slow[name].low, slow[name].high), rel=0.1)


def test_a_question_counts_once_and_only_if_all_its_rotations_are_right():
    # Questions of 2 to 4 rotations; the index of rotation k is base + k * 1,000,000.
    rng = np.random.default_rng(0)
    items, units = [], []
    for base in range(40):
        for k in range(2 + base % 3):
            record = {"index": base + k * 1_000_000, "answer": "A", "category": "c", "l2_category": ""}
            items.append(scored(float(rng.random() < 0.8), "A", **record))
            units.append(str(base))
    aggregate = partial(MMBench("en").aggregate, profile=Profile.paper)
    right = [min(i.score for i, u in zip(items, units, strict=True) if u == str(b)) for b in range(40)]
    plain = sums_interval(mean_of(right), [str(b) for b in range(40)])
    found = metric_intervals(aggregate, items, units, ["gpt_eval_score"])["gpt_eval_score"]
    assert (found.low, found.high) == pytest.approx((100 * plain.low, 100 * plain.high))


def test_same_seed_same_interval_other_seed_other_resamples():
    scores, images = np.random.default_rng(0).random(50), [str(i) for i in range(50)]
    assert sums_interval(mean_of(scores), images, seed=1) == sums_interval(mean_of(scores), images, seed=1)
    assert sums_interval(mean_of(scores), images, seed=1) != sums_interval(mean_of(scores), images, seed=2)


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    scores, images = np.random.default_rng(0).random(50), [str(i) for i in range(50)]
    whole = sums_interval(mean_of(scores), images)
    monkeypatch.setattr("morebench.reporting.stats.CHUNK", 700)
    assert sums_interval(mean_of(scores), images) == whole


def test_no_resample_lacks_a_category_of_mme():
    """It would count as 0 points. With one image in each there is nothing to draw."""
    items = [
        scored(score, question_id=f"{category}/1", category=category)
        for category, pair in (("count", (1, 1)), ("color", (1, 0)), ("OCR", (1, 1)))
        for score in pair
    ]
    images = [item.record["question_id"] for item in items]
    aggregate = partial(MME().aggregate, profile=Profile.paper)
    found = metric_intervals(aggregate, items, images, {"mme_perception_score"})
    assert found["mme_perception_score"] == Interval(450.0, 450.0)
