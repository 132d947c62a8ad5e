"""Replays files of measured cases (`{"cases", "aggregate"}`) through our scorers, item by item."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.scoring import score_items
from morebench.evaluation.tasks.ai2d import AI2D
from morebench.evaluation.tasks.benchmark import Benchmark
from morebench.evaluation.tasks.gqa import GQA
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.evaluation.tasks.pope import POPE
from morebench.evaluation.tasks.scienceqa import ScienceQA
from morebench.evaluation.tasks.seedbench import SEEDBench
from morebench.evaluation.tasks.textvqa import TextVQA
from morebench.evaluation.vqa_answers import normalise

TOLERANCE = 1e-9

_BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "ai2d": AI2D,
    "gqa": GQA,
    "mmbench": lambda: MMBench("en"),
    "mmbench_cn": lambda: MMBench("cn"),
    "mmbench_en": lambda: MMBench("en"),
    "mme": MME,
    "mmmu": MMMU,
    "pope": POPE,
    "scienceqa": ScienceQA,
    "seed": SEEDBench,
    "textvqa": TextVQA,
}
_OUR_NAME = {"perception": "mme_perception_score", "cognition": "mme_cognition_score"}
_SCORE_KEY = {Profile.paper: "score", Profile.lmms_eval_0_7_3: "score_lmms_eval_0_7_3"}

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Replay:
    """`differences`: one line per item or aggregate that came out otherwise."""

    name: str
    num_compared: int
    differences: tuple[str, ...]


class _Comparison:
    def __init__(self) -> None:
        self.num_compared = 0
        self.differences: list[str] = []

    def same(self, where: str, expected: Any, found: Any) -> None:
        self.num_compared += 1
        numbers = isinstance(expected, int | float) and isinstance(found, int | float)
        if abs(expected - found) > TOLERANCE if numbers else expected != found:
            self.differences.append(f"{where}: expected {expected!r}, found {found!r}")


def replay(path: Path) -> Replay:
    """Raises DataError if the file is not one of golden cases of a benchmark we score."""
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        kind, cases = golden["benchmark"], golden["cases"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected JSON with `benchmark` and `cases`, found {error!r}") from error
    comparison = _Comparison()
    if kind == "vqa_normalizer":
        for case in cases:
            comparison.same(case["id"], case["score"], normalise(case["prediction"]))
    elif kind == "prompts":
        for case in cases:
            _compare_prompt(case, comparison)
    elif kind == "mmbench_circular":
        _compare_circular(cases, golden["aggregate"][Profile.paper.name], comparison)
    elif kind in _BENCHMARKS:
        for profile in Profile:
            _compare_items(_BENCHMARKS[kind](), cases, golden.get("aggregate", {}), profile, comparison)
    else:
        raise DataError(
            f"{path}: unknown benchmark {kind!r}, expected one of {', '.join(sorted(_BENCHMARKS))}"
        )
    return Replay(path.stem, comparison.num_compared, tuple(comparison.differences))


def _compare_items(
    benchmark: Benchmark,
    cases: Sequence[Case],
    aggregates: Mapping[str, Any],
    profile: Profile,
    comparison: _Comparison,
) -> None:
    items = score_items(benchmark, ((case["prediction"], case["record"]) for case in cases), profile)
    for case, item in zip(cases, items, strict=True):
        found = None if isinstance(benchmark, MMBench) and item.parsed is None else item.score
        comparison.same(f"{case['id']} ({profile.name})", case[_SCORE_KEY[profile]], found)
    expected = dict(aggregates.get(profile.name, {}))
    if isinstance(benchmark, MMBench):  # single rows, not whole questions: counts of rows
        ours = {
            "resolved": float(sum(item.parsed is not None for item in items)),
            "correct": sum(item.score for item in items),
        }
        expected.pop("static_correct", None)
    else:
        ours = benchmark.aggregate(items, profile)
        expected |= expected.pop("per_category", {})
        printable = expected.pop("printable", {})
        expected |= {name: row["acc"] for name, row in printable.items() if name != "Overall"}
    for name, value in expected.items():
        comparison.same(f"{name} ({profile.name})", value, ours.get(_OUR_NAME.get(name) or name))


def _compare_circular(cases: Sequence[Case], aggregate: Mapping[str, Any], comparison: _Comparison) -> None:
    rows = [(row["prediction"], row) for case in cases for row in case["record"]["rows"]]
    modes = (
        ("none", "score_exact_matching", "overall_unresolved_wrong"),
        ("lmms_random", "score", "overall_no_judge_random_fallback"),
    )
    for judge, key, name in modes:
        benchmark = MMBench("en", judge)
        items = iter(score_items(benchmark, rows, Profile.paper))
        by_case = [[next(items) for _ in case["record"]["rows"]] for case in cases]
        for case, scored in zip(cases, by_case, strict=True):
            if case[key] is not None:  # left open where the draw depends on the whole file
                right = all(item.score for item in scored)
                comparison.same(f"{case['id']} (judge={judge})", case[key], float(right))
        ours = benchmark.aggregate([item for scored in by_case for item in scored], Profile.paper)
        comparison.same(name, aggregate[name], ours["gpt_eval_score"])


def _compare_prompt(case: Case, comparison: _Comparison) -> None:
    benchmark = _BENCHMARKS[case["benchmark"]]()
    paper = benchmark.question(case["record"], Profile.paper)
    newer = benchmark.question(case["record"], Profile.lmms_eval_0_7_3)
    comparison.same(f"{case['id']} text", case["user_message_paper"], paper.text)
    comparison.same(f"{case['id']} images", tuple(case["images"]), paper.images)
    tokens = "<image> " * len(newer.images)
    comparison.same(
        f"{case['id']} text (0.7.3)", f"{tokens[:-1]}\n{case['text_lmms_eval_0_7_3']}", newer.text
    )
    comparison.same(f"{case['id']} images (0.7.3)", tuple(case["images_lmms_eval_0_7_3"]), newer.images)
