"""How sure a score is: percentile bootstrap intervals that resample images, not questions.

Questions about one image succeed and fail together (POPE asks 18, GQA 31.6 of each), so an image is drawn
with all its questions. With one question per image this is the ordinary bootstrap over items.
`benchmarks/interval_coverage.py` measures how often the interval holds the truth.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from morebench.evaluation.tasks.benchmark import Scored
from morebench.evaluation.tasks.mme import COGNITION, PERCEPTION

CONFIDENCE = 0.95
RESAMPLES = 2_000
AGGREGATE_RESAMPLES = 1_000  # of aggregates that run in Python
MAX_GROUPS = 20
CHUNK = 4_000_000  # draws held in memory at once

Aggregate = Callable[[list[Scored]], Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class SumStatistic:
    """A metric that depends on the items through sums alone, so that all resamples are one matrix product."""

    sums_of: np.ndarray  # [N, K]: what is summed, a row per item
    of_sums: Callable[[np.ndarray], np.ndarray]  # sums [R, K] -> values [R]
    best: float = 1.0  # the value when every item is right
    strata: Sequence[str] | None = None  # of the items; a resample draws as many images of each as there are

    def value(self, chosen: Sequence[int] | None = None) -> float:
        rows_NK = self.sums_of if chosen is None else self.sums_of[list(chosen)]
        return float(self.of_sums(rows_NK.sum(axis=0, keepdims=True))[0])


def metric_intervals(
    aggregate: Aggregate,
    items: Sequence[Scored],
    images: Sequence[str],
    metrics: Collection[str],
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of `metrics`, keys of what `aggregate` returns. `images[i]` is the image item i asks about.

    A metric that proves to be a mean or an F1 takes a fast path; any other is aggregated for each resample.
    """
    fast = _as_sums(aggregate, items, images, metrics)
    intervals = {name: sums_interval(statistic, images, seed=seed) for name, statistic in fast.items()}
    if slow := set(metrics) - set(fast):
        resampled = aggregate_intervals(aggregate, items, images, seed=seed)
        intervals |= {name: resampled[name] for name in slow}
    return intervals


def mean_of(scores: Sequence[float], chosen: Sequence[bool] | None = None) -> SumStatistic:
    """Mean over all items, or over the `chosen` ones; 0 if there are none."""
    scores_N = np.asarray(scores, dtype=float)
    weights_N = np.ones_like(scores_N) if chosen is None else np.asarray(chosen, dtype=float)
    return SumStatistic(
        np.stack([scores_N * weights_N, weights_N], axis=1),
        lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1.0),
    )


def f1_of(answers: Sequence[str], predictions: Sequence[str | None]) -> SumStatistic:
    """F1 of "yes". An answer that is neither yes nor no is in no count, as in POPE."""
    pairs = list(zip(answers, predictions, strict=True))
    outcomes = (("yes", "yes"), ("no", "yes"), ("yes", "no"))  # hit, false alarm, miss
    columns_NK = np.array([[pair == outcome for outcome in outcomes] for pair in pairs], dtype=float)

    def f1(sums: np.ndarray) -> np.ndarray:
        hits, false_alarms, misses = sums.T
        return 2 * hits / np.maximum(2 * hits + false_alarms + misses, 1.0)  # no yes at all: 0

    return SumStatistic(columns_NK, f1)


def all_right(scores: Sequence[float], units: np.ndarray) -> SumStatistic:
    """Percentage of units whose items are all right (MMBench: a question with its rotations)."""
    _, first, unit_of_item = np.unique(units, return_index=True, return_inverse=True)
    worst_U = np.ones(len(first))
    np.minimum.at(worst_U, unit_of_item, np.asarray(scores, dtype=float))
    columns_NK = np.zeros((len(scores), 2))
    columns_NK[first] = np.stack([worst_U, np.ones_like(worst_U)], axis=1)
    return SumStatistic(columns_NK, lambda sums: 100 * sums[:, 0] / np.maximum(sums[:, 1], 1.0), best=100.0)


def pair_points(items: Sequence[Scored], categories: Sequence[str]) -> SumStatistic:
    """MME: over categories, the sum of the mean points of an image (50 a right answer, 100 more for both)."""
    columns_NK = np.zeros((len(items), 2 * len(categories)))
    first_of: dict[tuple[str, str], int] = {}
    for row, item in enumerate(items):
        category = item.record["category"]
        if category not in categories:
            continue
        first = first_of.setdefault((category, item.record["question_id"]), row)
        k = 2 * categories.index(category)
        both = 100 * item.score * items[first].score if row != first else 0.0
        columns_NK[first, k] += 50 * item.score + both
        columns_NK[first, k + 1] = 1.0

    def total(sums: np.ndarray) -> np.ndarray:
        return (sums[:, ::2] / np.maximum(sums[:, 1::2], 1.0)).sum(axis=1)

    # A category that a resample lacked would count as 0 points: the sum would be too low on average.
    strata = [item.record["category"] for item in items]
    return SumStatistic(columns_NK, total, best=200.0 * len(categories), strata=strata)


def sums_interval(
    statistic: SumStatistic, images: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """If every item scored 0, or every one 1, resampling could only repeat it: the exact binomial
    (Clopper-Pearson) bound over images stands in.
    """
    units_N = _unit_numbers(images)
    num_units = int(units_N.max()) + 1
    if (whole := statistic.value()) in (0.0, statistic.best):
        reach = statistic.best * (1.0 - ((1.0 - CONFIDENCE) / 2) ** (1.0 / num_units))
        return Interval(0.0, reach) if whole == 0.0 else Interval(whole - reach, whole)
    sums_UK = np.zeros((num_units, statistic.sums_of.shape[1]))
    np.add.at(sums_UK, units_N, statistic.sums_of)
    chunks = (
        np.stack([np.bincount(drawn, minlength=num_units) for drawn in chunk]) @ sums_UK
        for chunk in _draws(_strata(statistic.strata, units_N), resamples, seed)
    )
    values_R = np.concatenate([statistic.of_sums(chunk) for chunk in chunks])
    return _percentiles(values_R)


def aggregate_intervals(
    aggregate: Aggregate,
    items: Sequence[Scored],
    images: Sequence[str],
    resamples: int = AGGREGATE_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of everything `aggregate` returns, by running it on every resample."""
    units = _unit_numbers(images)
    names = _naming_fields(items, units)
    members: list[list[Scored]] = [[] for _ in set(images)]
    for item, unit in zip(items, units, strict=True):
        members[unit].append(item)

    copies: dict[tuple[int, int], list[Scored]] = {}

    def copy(unit: int, number: int) -> list[Scored]:
        if (unit, number) not in copies:
            copies[unit, number] = [_renamed(item, names, number) for item in members[unit]]
        return copies[unit, number]

    values: dict[str, list[float]] = {}
    for chunk in _draws([np.arange(len(members))], resamples, seed):
        for drawn in chunk.tolist():
            times: dict[int, int] = {}
            resample: list[Scored] = []
            for unit in drawn:
                times[unit] = times.get(unit, 0) + 1
                resample += copy(unit, times[unit])
            for metric, value in aggregate(resample).items():
                values.setdefault(metric, []).append(value)
    return {metric: _percentiles(np.asarray(found)) for metric, found in values.items()}


def _as_sums(
    aggregate: Aggregate, items: Sequence[Scored], images: Sequence[str], metrics: Collection[str]
) -> dict[str, SumStatistic]:
    """The metrics that one of our sums reproduces, on all items and on random halves of the images."""
    units = _unit_numbers(images)
    candidates = _candidates(items, units)
    size = int(units.max()) + 1
    halves = [np.random.default_rng(i).permutation(size)[: (size + 1) // 2] for i in range(3)]
    samples = [list(range(len(items))), *(np.flatnonzero(np.isin(units, half)).tolist() for half in halves)]
    wanted = [aggregate([items[i] for i in sample]) for sample in samples]
    found: dict[str, SumStatistic] = {}
    for metric in metrics:
        values = [result.get(metric, np.nan) for result in wanted]
        for candidate in candidates:
            if np.allclose([candidate.value(sample) for sample in samples], values, rtol=0, atol=1e-9):
                found[metric] = candidate
                break
    return found


def _candidates(items: Sequence[Scored], units: np.ndarray) -> list[SumStatistic]:
    scores = [item.score for item in items]
    candidates = [
        mean_of(scores),
        *(mean_of(scores, chosen) for chosen in _groups(items)),
        all_right(scores, units),
    ]
    if all("answer" in item.record for item in items):
        candidates.append(f1_of([item.record["answer"] for item in items], [item.parsed for item in items]))
    if all({"category", "question_id"} <= item.record.keys() for item in items):
        candidates += [pair_points(items, part) for part in (PERCEPTION, COGNITION)]
    return candidates


def _groups(items: Sequence[Scored]) -> Iterator[list[bool]]:
    """Which items have a value of a record field, for every field of few values (SEED's image and video)."""
    for field in sorted(set.intersection(*(set(item.record) for item in items))):
        values = [item.record[field] for item in items]
        if 1 < len(set(values)) <= MAX_GROUPS:
            for value in sorted(set(values), key=str):
                yield [other == value for other in values]


def _naming_fields(items: Sequence[Scored], units: np.ndarray) -> list[str]:
    """Record fields that tell images apart: none of their values stands with two images."""
    fields = set.intersection(*(set(item.record) for item in items))
    naming = []
    for field in sorted(fields):
        owner: dict[Hashable, int] = {}
        if all(
            owner.setdefault(item.record[field], unit) == unit
            for item, unit in zip(items, units, strict=True)
        ):
            naming.append(field)
    return naming


def _renamed(item: Scored, fields: Sequence[str], copy: int) -> Scored:
    """An image drawn twice counts as two images, also for an aggregate that groups by name (MME's pairs)."""
    if copy == 1:
        return item
    return replace(
        item, record={**item.record, **{field: f"{item.record[field]}#{copy}" for field in fields}}
    )


def _percentiles(values: np.ndarray) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _unit_numbers(images: Sequence[str]) -> np.ndarray:
    """0-based number of each item's image, in order of first appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(image, len(seen)) for image in images], dtype=np.int64)


def _strata(strata: Sequence[str] | None, units_N: np.ndarray) -> list[np.ndarray]:
    """Unit numbers of each stratum."""
    if strata is None:
        return [np.arange(int(units_N.max()) + 1)]
    of_unit = dict(zip(units_N.tolist(), strata, strict=True))
    return [
        np.array([unit for unit, own in of_unit.items() if own == stratum])
        for stratum in dict.fromkeys(strata)
    ]


def _draws(strata: Sequence[np.ndarray], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """All resamples, in chunks [r, units] of drawn unit numbers."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // sum(map(len, strata)))
    for start in range(0, resamples, rows):
        num = min(rows, resamples - start)
        drawn = [units[generator.integers(0, len(units), size=(num, len(units)))] for units in strata]
        yield np.concatenate(drawn, axis=1)
