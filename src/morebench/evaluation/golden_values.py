"""What our scorers say about golden cases, under the names that the files use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.contractions import CONTRACTIONS
from morebench.evaluation.mmbench_letters import by_letter, guess_letter
from morebench.evaluation.mmmu_answers import parse_open
from morebench.evaluation.scoring import score_items, without_reasoning
from morebench.evaluation.tasks.ai2d import AI2D
from morebench.evaluation.tasks.benchmark import (
    IMAGE_TOKEN,
    NEEDS_JUDGE,
    RANDOM_FALLBACK,
    Benchmark,
    Scored,
)
from morebench.evaluation.tasks.gqa import GQA
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME, PERCEPTION
from morebench.evaluation.tasks.mmmu import DOMAINS, MMMU
from morebench.evaluation.tasks.pope import POPE
from morebench.evaluation.tasks.scienceqa import ScienceQA
from morebench.evaluation.tasks.seedbench import SEEDBench
from morebench.evaluation.tasks.textvqa import TextVQA
from morebench.evaluation.vqa_answers import normalise

Case = Mapping[str, Any]
Found = dict[str, Any]

_NEWER = Profile.lmms_eval_0_7_3
_SUFFIX = {Profile.paper: "", _NEWER: f"_{_NEWER.name}"}
_JUDGE_ROUNDS = 3  # failing ones, before a letter is drawn


@dataclass(frozen=True)
class Values:
    """Texts and numbers in any order. The files write numbers that are not finite as text."""

    members: Sequence[str | float]

    def holds(self, others: Sequence[str | float]) -> bool:
        return _spelt(self.members) == _spelt(others)


@dataclass(frozen=True)
class Answers:
    """Our values: for each case, and for the whole file by the key they have in it."""

    cases: list[Found]
    whole: Found = field(default_factory=dict)


def _spelt(members: Sequence[str | float]) -> set[str]:
    return {member if isinstance(member, str) else str(float(member)) for member in members}


def _items(benchmark: Benchmark, golden: Mapping[str, Any]) -> Answers:
    cases: Sequence[Case] = golden["cases"]
    answers = Answers([{} for _ in cases], {"aggregate": {}})
    for profile, suffix in _SUFFIX.items():
        items = score_items(benchmark, ((case["prediction"], case["record"]) for case in cases), profile)
        for case, item, ours in zip(cases, items, answers.cases, strict=True):
            found = {"score": item.score, "target": _target(benchmark, case)}
            found |= _read(benchmark, case, item, profile)
            ours.update({f"{name}{suffix}": value for name, value in found.items()})
        answers.whole["aggregate"][profile.name] = _aggregate(benchmark, items, profile)
    if isinstance(benchmark, MMBench):
        _read_static(answers, cases)
    return answers


def _target(benchmark: Benchmark, case: Case) -> Any:
    theirs = case.get("target")
    try:
        ours = benchmark.target(case["record"])
    except (
        DataError
    ):  # the reference scores some records that we refuse to ask, such as a "nan" for an answer
        return case["record"]["answer"]
    is_yes_no = isinstance(benchmark, MME | POPE)  # the files keep the record's spelling
    return theirs if is_yes_no and str(theirs).lower() == ours else ours


def _read(benchmark: Benchmark, case: Case, item: Scored, profile: Profile) -> Found:
    """What a scorer read out of the prediction, under the name its file has for it."""
    prediction = without_reasoning(benchmark.filtered(case["prediction"], profile), profile).strip()
    if isinstance(benchmark, MMBench):
        resolved = item.parsed is not None
        return {
            "score": item.score if resolved else None,
            "score_exact_matching": item.score,
            "parsed": item.parsed,
            "letter_rule": by_letter(prediction),
        }
    if isinstance(benchmark, MMMU):
        is_open = case["record"]["question_type"] != "multiple-choice"
        parsed = Values(parse_open(prediction)) if is_open else item.parsed
        return {"parsed": parsed, "random_fallback": RANDOM_FALLBACK in item.flags}
    if isinstance(benchmark, MME):
        # The older key is misspelt.
        perception = "mme_percetion_score" if profile is Profile.paper else "mme_perception_score"
        is_perception = case["record"]["category"] in PERCEPTION
        return {"label": item.parsed, "metric_key": perception if is_perception else "mme_cognition_score"}
    if isinstance(benchmark, TextVQA):
        answers = [normalise(answer) for answer in benchmark.target(case["record"])]
        return {"normalized": item.parsed, "normalized_answers": answers}
    name = {POPE: "prediction_normalized", AI2D: "filtered"}.get(type(benchmark), "parsed")
    if isinstance(benchmark, AI2D):
        filtered = benchmark.filtered(case["prediction"], profile)
        # The files keep the white space that scoring takes off.
        return {name: filtered if filtered == case.get(f"{name}{_SUFFIX[profile]}") else filtered.strip()}
    return {name: item.parsed}


def _read_static(answers: Answers, cases: Sequence[Case]) -> None:
    for case, ours in zip(cases, answers.cases, strict=True):
        prediction = without_reasoning(case["prediction"], _NEWER)
        letter = ours[f"parsed{_SUFFIX[_NEWER]}"] or guess_letter(prediction)
        ours["static_parsed_0_7_3"] = letter or ""
        ours["static_score_0_7_3"] = float(letter == ours["target"])
    for profile, suffix in _SUFFIX.items():  # single rows, not whole questions: counts of rows
        counts = answers.whole["aggregate"][profile.name]
        counts["resolved"] = sum(ours[f"score{suffix}"] is not None for ours in answers.cases)
        counts["correct"] = sum(ours[f"score{suffix}"] or 0.0 for ours in answers.cases)
        counts["static_correct"] = sum(ours["static_score_0_7_3"] for ours in answers.cases)


def _aggregate(benchmark: Benchmark, items: Sequence[Scored], profile: Profile) -> Found:
    """Our metrics, those of parts nested, and the files' own names for some of them."""
    if not items:
        return {}
    found: Found = {}
    for name, value in benchmark.aggregate(items, profile).items():
        place, *parts = found, *name.split("/")
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    found["per_category"] = found.get("by_category", {})
    if isinstance(benchmark, MME):
        found |= {name: found[f"mme_{name}_score"] for name in ("perception", "cognition")}
        found["mme_percetion_score"] = found["perception"]
    if isinstance(benchmark, MMMU):
        found["printable"] = _printable(found, items)
    return found


def _printable(found: Found, items: Sequence[Scored]) -> Found:
    """The table that the reference prints: domains and subjects with their counts."""
    subjects = [item.record["subject"] for item in items]
    table: Found = {
        name: {"num": subjects.count(name), "acc": value} for name, value in found["by_subject"].items()
    }
    for domain, names in DOMAINS.items():
        count = sum(subjects.count(name) for name in names.split())
        table[f"Overall-{domain}"] = {"num": count, "acc": found.get("by_domain", {}).get(domain, 0.0)}
    return {**table, "Overall": {"num": len(items), "acc": found["mmmu_acc"]}}


def _circular(golden: Mapping[str, Any]) -> Answers:
    """A case is a question with all its rotations."""
    cases: Sequence[Case] = golden["cases"]
    rotations = [
        [
            (row["prediction"] if "prediction" in row else case["prediction"][number], row)
            for number, row in enumerate(case["record"]["rows"])
        ]
        for case in cases
    ]
    answers = Answers([{"target": [row["answer"] for _, row in rows]} for rows in rotations])
    whole: Found = {profile.name: {} for profile in Profile}
    for profile, suffix in _SUFFIX.items():
        unjudged, ours = _judged("none", rotations, profile)
        states = [_state(items) for items in unjudged]
        # Without a judge the score of an open question hangs on a draw, and so on the file before it.
        score = {"hit": 1.0, "miss": 0.0, "needs_judge": None}
        for found, items, state in zip(answers.cases, unjudged, states, strict=True):
            found[f"state{suffix}"], found[f"score{suffix}"] = state, score[state]
            found[f"score_exact_matching{suffix}"] = _all_right(items)
        drawn, random = _judged("lmms_random", rotations, profile)
        static, fixed = _judged("static", rotations, profile)
        for found, items in zip(answers.cases, static, strict=True):
            found["static_score_0_7_3"] = _all_right(items)
        draws = sum(RANDOM_FALLBACK in item.flags for items in drawn for item in items)
        whole[profile.name] = {
            "overall_unresolved_wrong": ours["gpt_eval_score"],
            "category_unresolved_wrong": _parts(ours),
            "overall_no_judge_random_fallback": random["gpt_eval_score"],
            "category_no_judge_random_fallback": _parts(random),
            "l2_category_no_judge_random_fallback": _parts(random, "by_l2_category"),
            "overall_static": fixed["gpt_eval_score"],
            "category_static": _parts(fixed),
            "failed_judge_calls": _JUDGE_ROUNDS * draws,
            "n_groups": len(cases),
            "n_needs_judge": states.count("needs_judge"),
        }
    return Answers(answers.cases, {"aggregate": whole})


def _judged(
    judge: str, rotations: Sequence[Sequence[tuple[str, Case]]], profile: Profile
) -> tuple[list[list[Scored]], dict[str, float]]:
    benchmark = MMBench("en", judge)
    items = score_items(benchmark, [row for rows in rotations for row in rows], profile)
    rest = iter(items)
    return [[next(rest) for _ in rows] for rows in rotations], benchmark.aggregate(items, profile)


def _state(items: Sequence[Scored]) -> str:
    if any(NEEDS_JUDGE in item.flags for item in items):
        return "needs_judge"
    return "hit" if all(item.score for item in items) else "miss"


def _all_right(items: Sequence[Scored]) -> float:
    return float(all(item.score for item in items))


def _parts(metrics: Mapping[str, float], kind: str = "by_category") -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{kind}/")}


def _prompts(golden: Mapping[str, Any]) -> Answers:
    return Answers([_prompt(case) for case in golden["cases"]])


def _prompt(case: Case) -> Found:
    benchmark = _BENCHMARKS[case["benchmark"]]()
    paper = benchmark.question(case["record"], Profile.paper)
    newer = benchmark.question(case["record"], _NEWER)
    front = " ".join([IMAGE_TOKEN] * len(newer.images)) + "\n"
    return {
        "text": paper.text.removeprefix(f"{IMAGE_TOKEN}\n") if not _places_images(benchmark) else paper.text,
        "user_message_paper": paper.text,
        "images": list(paper.images),
        f"text{_SUFFIX[_NEWER]}": newer.text.removeprefix(front),
        f"images{_SUFFIX[_NEWER]}": list(newer.images),
    }


def _places_images(benchmark: Benchmark) -> bool:
    return isinstance(benchmark, MMMU)


def _normaliser(golden: Mapping[str, Any]) -> Answers:
    texts = [normalise(case["prediction"]) for case in golden["cases"]]
    return Answers([{f"score{suffix}": text for suffix in _SUFFIX.values()} for text in texts])


def _contractions(golden: Mapping[str, Any]) -> Answers:
    # Words are lower-cased, and every 's split off, before they are looked up.
    unreachable = [key for key in CONTRACTIONS if key != key.lower() or "'s" in key]
    return Answers([], {"table": CONTRACTIONS, "unreachable": Values(unreachable)})


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
    "scienceqa_img": ScienceQA,
    "seed": SEEDBench,
    "seedbench": SEEDBench,
    "textvqa": TextVQA,
}


def _of(make: Callable[[], Benchmark]) -> Callable[[Mapping[str, Any]], Answers]:
    return lambda golden: _items(make(), golden)


KINDS: dict[str, Callable[[Mapping[str, Any]], Answers]] = {
    **{name: _of(make) for name, make in _BENCHMARKS.items()},
    "mmbench_circular": _circular,
    "prompts": _prompts,
    "vqa_contractions": _contractions,
    "vqa_normalizer": _normaliser,
}
"""File kind (see `golden._kind`) -> our values for a file of that kind."""
