"""Replays published outputs through our scorers: does an item, and the whole, score here as it did there?"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morebench.config.schema import Profile
from morebench.errors import DataError, join_problems
from morebench.evaluation.items import Item, OpenTask
from morebench.evaluation.mmmu_answers import matches_open
from morebench.evaluation.outputs import Output, read_metrics, read_outputs
from morebench.evaluation.scoring import score_items
from morebench.evaluation.tasks.benchmark import IMAGE_TOKEN, RANDOM_FALLBACK

TOLERANCE = 1e-9
_ID_FIELDS = ("question_id", "id", "index", "image_id")  # of a record, for outputs without a position
_LEADING_IMAGES = re.compile(rf"(\s*{IMAGE_TOKEN})+\s*")


@dataclass(frozen=True)
class Metric:
    name: str
    ours: float
    published: float | None  # None: not published

    @property
    def differs(self) -> bool:
        return self.published is not None and abs(self.ours - self.published) > TOLERANCE


@dataclass(frozen=True)
class Replayed:
    """`differences`: one line per item whose published score is not ours."""

    num_items: int
    num_scores: int  # items with a published score
    num_guesses: int  # items scored by a random draw there; the draw is taken over
    differences: tuple[str, ...]
    other_prompts: tuple[str, ...]  # ids of items that were asked otherwise there
    metrics: tuple[Metric, ...]
    unknown_metrics: tuple[str, ...]  # published, not compared: we have none of that name
    metrics_file: Path | None

    @property
    def is_same(self) -> bool:
        return not self.differences and not any(metric.differs for metric in self.metrics)


def replay_outputs(path: Path, task: OpenTask, profile: Profile) -> Replayed:
    """Raises DataError unless every item of the task has exactly one output and nothing else has."""
    outputs = _joined(task.items, read_outputs(path), path)
    _check_targets(task.items, outputs, task, path)
    published = read_metrics(path, task.name)
    answered = [(output.prediction, item.record) for output, item in zip(outputs, task.items, strict=True)]
    scored = score_items(task.benchmark, answered, profile)
    scores = _published_scores(outputs, profile, path)
    differences, num_scores, num_guesses = [], 0, 0
    for at, (item, output, there) in enumerate(zip(task.items, outputs, scores, strict=True)):
        if there is None:
            continue
        num_scores += 1
        if RANDOM_FALLBACK in scored[at].flags:
            num_guesses += 1
            scored[at] = replace(scored[at], score=there)
        elif abs(there - scored[at].score) > TOLERANCE:
            target = str(task.benchmark.target(item.record))
            differences.append(
                f"{item.id}: {there:g} there, {scored[at].score:g} here; {output.prediction[:80]!r} "
                f"read as {scored[at].parsed!r}, target {target[:80]!r}"
            )
    ours = task.benchmark.aggregate(scored, profile)
    theirs = published[1] if published else {}
    return Replayed(
        num_items=len(scored),
        num_scores=num_scores,
        num_guesses=num_guesses,
        differences=tuple(differences),
        other_prompts=tuple(
            item.id
            for item, output in zip(task.items, outputs, strict=True)
            if output.prompt is not None and _bare(output.prompt) != _bare(item.question.text)
        ),
        metrics=tuple(Metric(name, value, theirs.get(name)) for name, value in ours.items()),
        unknown_metrics=tuple(name for name in theirs if name not in ours),
        metrics_file=published[0] if published else None,
    )


def _published_scores(outputs: Sequence[Output], profile: Profile, path: Path) -> list[float | None]:
    scores, problems = [], []
    for output in outputs:
        try:
            scores.append(published_score(output.score, profile))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(
                f"{path}: {output.id}: no score can be read from {output.score!r}: {error!r}"[:300]
            )
    if problems:
        raise DataError(join_problems(problems))
    return scores


def published_score(found: Any, profile: Profile) -> float | None:
    """What a harness wrote of one item: a number, or what its aggregate takes; None if that is no score."""
    if isinstance(found, bool | int | float):
        return float(found)
    if not isinstance(found, Mapping):
        return None
    if "score" in found:
        return float(found["score"])
    if "pred" in found:  # SEED
        pair = (str(found["pred"]), str(found["answer"]))
        return float(pair[0] == pair[1] if profile is Profile.paper else pair[0].lower() == pair[1].lower())
    if "parsed_pred" in found:  # MMMU; lmms-eval 0.7 keeps one per repetition
        parsed, is_choice = found["parsed_pred"], found.get("question_type") == "multiple-choice"
        if isinstance(parsed, list) and len(parsed) == 1 and (is_choice or isinstance(parsed[0], list)):
            parsed = parsed[0]
        if is_choice:
            return float(parsed == str(found["answer"]))
        answers = found["answer"] if isinstance(found["answer"], list) else [found["answer"]]
        return float(matches_open(list(parsed), [str(answer) for answer in answers]))
    return None


def _joined(items: Sequence[Item], outputs: Sequence[Output], path: Path) -> list[Output]:
    """The outputs in the order of the items."""
    found: dict[int, list[Output]] = defaultdict(list)
    surplus = []
    place = _place_of(items, outputs)
    for output in outputs:
        at = place(output)
        if at is None:
            surplus.append(output.id)
        else:
            found[at].append(output)
    missing = [item.id for at, item in enumerate(items) if at not in found]
    twice = [items[at].id for at, own in found.items() if len(own) > 1]
    counted = {"without an output": missing, "with several outputs": twice, "that no item has": surplus}
    if problems := [f"{len(ids)} ids {what}: {_some(ids)}" for what, ids in counted.items() if ids]:
        raise DataError(
            f"{path} has {len(outputs)} outputs for {len(items)} items:\n" + join_problems(problems)
        )
    return [found[at][0] for at in range(len(items))]


def _place_of(items: Sequence[Item], outputs: Sequence[Output]) -> Callable[[Output], int | None]:
    """Which item an output is of, as its position in `items`."""
    if all(output.place is not None for output in outputs):
        by_index = {item.index: at for at, item in enumerate(items)}
        return lambda output: by_index.get(-1 if output.place is None else output.place)
    ids = {output.id for output in outputs}
    keys = [[item.id for item in items]]
    keys += [[str(item.record.get(field)) for item in items] for field in _ID_FIELDS]
    best = max(keys, key=lambda key: len(ids & set(key)))  # records have several ids; harnesses print one
    places: dict[str, list[int]] = defaultdict(list)
    for at, key in enumerate(best):
        places[key].append(at)

    def place(output: Output) -> int | None:
        alike = places.get(output.id, [])
        if len(alike) > 1:  # one id for several questions about an image
            alike = _asking(output.prompt or "", {at: items[at] for at in alike})
        return alike[0] if len(alike) == 1 else None

    return place


def _asking(prompt: str, items: Mapping[int, Item]) -> list[int]:
    """Whose question is the prompt's first line; or else begins it, or begins with it (an instruction)."""
    asked = _bare(prompt).partition("\n")[0].strip().lower()
    questions = {at: str(item.record.get("question", "")).strip().lower() for at, item in items.items()}
    if same := [at for at, question in questions.items() if question == asked]:
        return same
    return [at for at, q in questions.items() if asked and (q.startswith(asked) or asked.startswith(q))]


def _check_targets(items: Sequence[Item], outputs: Sequence[Output], task: OpenTask, path: Path) -> None:
    """Other records, or the same in another order, would give scores that mean nothing."""
    other = []
    for item, output in zip(items, outputs, strict=True):
        target = task.benchmark.target(item.record)
        if (
            output.target is not None
            and isinstance(target, str)
            and output.target.strip().lower() != target.lower()
        ):
            other.append(f"{item.id}: target {output.target[:80]!r} there, {target[:80]!r} in our records")
    if other:
        raise DataError(
            f"{path}: {len(other)} of {len(items)} items have another target than our records of "
            f"{task.name}. Another split, revision or order?\n{join_problems(other, limit=5)}"
        )


def _bare(text: str) -> str:
    return _LEADING_IMAGES.sub("", text, count=1) if text.lstrip().startswith(IMAGE_TOKEN) else text


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
