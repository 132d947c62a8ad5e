"""Finished run folders -> numbers with their doubt and their price. Nothing here trains or scores."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from morebench.config import compose
from morebench.config.schema import Column, Config, Step
from morebench.errors import RunError
from morebench.evaluation.tasks.benchmark import Benchmark, Scored
from morebench.reporting.stats import metric_intervals

MMBENCH_ROTATION = 1_000_000  # rotation k of question `base` has the index base + k * 1,000,000
EXCLUSIONS = ("quarantined", "truncated", "unsupervised")  # counts in a train step's manifest


@dataclass(frozen=True)
class ReportRow:
    """One cell as the matrix knows it. `runs`: step name -> run folder, None where there is none yet."""

    cell: Mapping[str, str]  # axis -> choice
    labels: Mapping[str, str]  # axis -> printed label
    seed: int
    runs: Mapping[str, Path | None]


@dataclass(frozen=True)
class Score:
    """A column's number and its 95 % interval, in the printed unit (the column's factor applied)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Predicted:
    """Before a train step's first start."""

    flops: float | None = None
    seconds: float | None = None
    memory_gib: float | None = None  # on one rank


@dataclass(frozen=True)
class StepCost:
    seconds: float | None
    gpu_hours: float | None
    tokens_per_s: float | None  # median over the optimizer steps; None for an evaluate step
    mfu: float | None  # share of the device's peak
    flops: float | None = None
    memory_gib: float | None = None  # on the rank that took most
    predicted: Predicted = Predicted()


@dataclass(frozen=True)
class CellResult:
    """What one row of the table says. `scores` lacks a column that was not measured."""

    row: ReportRow
    run_ids: dict[str, str]  # step name -> run id, of the steps that have a folder
    evaluated: bool
    profile: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    controls: dict[str, dict[str, Score]] = field(default_factory=dict)
    costs: dict[str, StepCost] = field(default_factory=dict)
    exclusions: dict[str, dict[str, int]] = field(default_factory=dict)  # step name -> kind -> samples
    anomalies: tuple[str, ...] = ()
    num_answers: int = 0  # of the tasks, controls aside
    odd_answers: dict[str, int] = field(default_factory=dict)  # kind of `evaluation.anomalies` -> how many
    warnings: tuple[str, ...] = ()  # what makes a task's numbers doubtful
    commits: tuple[str, ...] = ()

    @property
    def run(self) -> str | None:
        return self.run_ids.get(Step.evaluate.value)

    @property
    def evaluate_folder(self) -> Path:
        folder = self.row.runs.get(Step.evaluate.value)
        assert folder is not None
        return folder


def load_results(rows: Sequence[ReportRow], columns: Sequence[Column]) -> list[CellResult]:
    """One result per row, in order. Raises RunError on a finished run whose files contradict each other."""
    return [load_result(row, columns) for row in rows]


def load_result(row: ReportRow, columns: Sequence[Column]) -> CellResult:
    folders = {step: folder for step, folder in row.runs.items() if folder is not None and folder.is_dir()}
    manifests = {step: read_json(folder / "manifest.json", default={}) for step, folder in folders.items()}
    result = CellResult(
        row=row,
        run_ids={step: folder.name for step, folder in folders.items()},
        evaluated=False,
        costs={step: _cost(folder, manifests[step]) for step, folder in folders.items() if _is_done(folder)},
        exclusions={
            step: counts for step, manifest in manifests.items() if (counts := _exclusions(manifest))
        },
        anomalies=tuple(f"{step}: {text}" for step, found in manifests.items() for text in _anomalies(found)),
        commits=tuple(dict.fromkeys(_commit(m["git"]) for m in manifests.values() if m.get("git"))),
    )
    folder = folders.get(Step.evaluate.value)
    if folder is None or not _is_done(folder):
        return result
    config = compose.load_config(folder / "config.yaml")
    written = read_json(folder / "results.json")
    controls = written.get("controls", {})
    return replace(
        result,
        evaluated=True,
        profile=written.get("profile"),
        costs=_with_evaluate_seconds(result.costs, written.get("seconds")),
        scores=_scores(folder, config, columns, written["tasks"], control=None),
        num_answers=sum(task["n"] for task in written["tasks"].values()),
        odd_answers=_odd_answers(written["tasks"]),
        warnings=tuple(
            f"{name}: {text}" for name, task in written["tasks"].items() for text in task.get("warnings", ())
        ),
        controls={
            name: _scores(folder, config, columns, tasks, control=name) for name, tasks in controls.items()
        },
    )


def _odd_answers(tasks: Mapping[str, Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for task in tasks.values():
        counts.update({kind: found["n"] for kind, found in task.get("anomalies", {}).items()})
    return dict(counts)


def scored_items(folder: Path, task: str, control: str | None = None) -> list[tuple[dict[str, Any], Scored]]:
    """(prediction line, score) of every item, in order. Raises RunError if the two files list other items."""
    suffix = f".{control}" if control else ""
    predictions = read_lines(folder / "predictions" / f"{task}{suffix}.jsonl")
    scores = read_lines(folder / "scores" / f"{task}{suffix}.jsonl")
    if [line["id"] for line in predictions] != [line["id"] for line in scores]:
        raise RunError(
            f"{folder}: predictions/ and scores/ of {task}{suffix} must list the same items in order "
            f"({len(predictions)} and {len(scores)} lines). Score the predictions again: "
            "python -m morebench.evaluate."
        )
    return [(line, _scored(score)) for line, score in zip(predictions, scores, strict=True)]


def loss_curve(folder: Path) -> dict[int, float]:
    """Optimizer step -> loss; a step that a resume repeated counts once."""
    path = folder / "metrics.jsonl"
    lines = read_lines(path) if path.is_file() else []
    return {int(line["step"]): float(line["loss"]) for line in lines if line.get("loss") is not None}


def read_json(path: Path, default: Any = None) -> Any:
    """Raises RunError if the file is missing (and there is no default) or is not JSON."""
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} must be JSON as a finished run leaves it, but: {error}. Run the step again."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Raises RunError naming the line that is not JSON."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} must be there as a finished run leaves it, but: {error}.") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                parsed.append(json.loads(line))
        except ValueError as error:
            raise RunError(
                f"{path}, line {number}, must be JSON, but: {error}. Run the step again."
            ) from error
    return parsed


def _scores(
    folder: Path, config: Config, columns: Sequence[Column], tasks: Mapping[str, Any], control: str | None
) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for task, result in tasks.items():
        shown = [column for column in columns if column.task == task and column.metric in result["metrics"]]
        if not shown or not result["n"] or task not in config.suite.tasks:
            continue
        pairs = scored_items(folder, task, control)
        items = [item for _, item in pairs]
        own = pairs if control is None else scored_items(folder, task)  # a control shows other images
        units = [_unit(line, item) for (line, _), item in zip(own, items, strict=True)]
        benchmark: Benchmark = compose.build(config.suite.tasks[task].code)
        aggregate = partial(benchmark.aggregate, profile=config.stage.evaluate.profile)
        metrics = {column.metric for column in shown}
        _check_metrics(folder, task, result, aggregate(items), metrics, len(items))
        intervals = metric_intervals(aggregate, items, units, metrics)
        for column in shown:
            interval = intervals[column.metric]
            scores[column.label] = Score(
                value=column.factor * result["metrics"][column.metric],
                low=column.factor * interval.low,
                high=column.factor * interval.high,
                n=len(items),
            )
    return scores


def _unit(line: Mapping[str, Any], item: Scored) -> str:
    """What a resample draws as one: an image with its questions, an MMBench question with its rotations."""
    if isinstance(index := item.record.get("index"), int):
        return str(index % MMBENCH_ROTATION)
    return json.dumps(line.get("images_sha256") or line.get("image") or line["id"])


def _check_metrics(
    folder: Path,
    task: str,
    written: Mapping[str, Any],
    recomputed: Mapping[str, float],
    metrics: set[str],
    num_items: int,
) -> None:
    """A table never prints a number that its own items deny."""
    for metric in sorted(metrics):
        value = written["metrics"][metric]
        if written["n"] != num_items or not math.isclose(
            value, recomputed[metric], rel_tol=1e-6, abs_tol=1e-9
        ):
            raise RunError(
                f"{folder}/results.json says {metric} = {value} over {written['n']} items of {task}, but "
                f"scores/ gives {recomputed[metric]} over {num_items}. Run the evaluate step again."
            )


def _scored(line: Mapping[str, Any]) -> Scored:
    return Scored(line["score"], line.get("parsed"), tuple(line.get("flags", ())), line.get("record", {}))


def _is_done(folder: Path) -> bool:
    return (folder / "DONE").is_file()


def _cost(folder: Path, manifest: Mapping[str, Any]) -> StepCost:
    path = folder / "metrics.jsonl"
    training, predicted = manifest.get("training", {}), manifest.get("predicted", {})
    speeds = (
        sorted(line["tokens_per_s"] for line in read_lines(path) if line.get("tokens_per_s"))
        if path.is_file()
        else []
    )
    return StepCost(
        seconds=manifest.get("seconds"),
        gpu_hours=manifest.get("gpu_hours"),
        tokens_per_s=speeds[len(speeds) // 2] if speeds else None,
        mfu=training.get("mfu"),
        flops=training.get("flops"),
        memory_gib=training.get("peak_memory_gib"),
        predicted=Predicted(**{key: predicted.get(key) for key in ("flops", "seconds", "memory_gib")}),
    )


def _with_evaluate_seconds(costs: Mapping[str, StepCost], seconds: float | None) -> dict[str, StepCost]:
    step = Step.evaluate.value
    return {**costs, step: replace(costs[step], seconds=costs[step].seconds or seconds)}


def _exclusions(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {kind: count for kind in EXCLUSIONS if (count := manifest.get(kind, 0))}


def _anomalies(manifest: Mapping[str, Any]) -> list[str]:
    found = manifest.get("anomalies", [])
    return [entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True) for entry in found]


def _commit(git: Mapping[str, Any]) -> str:
    return f"{git['commit'][:12]}{' with uncommitted changes' if git.get('diff_sha256') else ''}"
