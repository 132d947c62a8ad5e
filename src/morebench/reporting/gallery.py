"""A few questions of each task with their pictures and what the cell answered, right and wrong."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from morebench.config import compose
from morebench.config.schema import Column, Config
from morebench.evaluation.tasks.benchmark import IMAGE_TOKEN
from morebench.reporting.results import CellResult, scored_items

PER_VERDICT = 3  # right ones, and as many wrong ones, per cell and task
RIGHT_FROM = 0.5  # of an item's score; soft scores lie between 0 and 1
THUMBNAIL = 224  # pixels of the longer side


@dataclass(frozen=True)
class Example:
    image: str | None  # data URI
    question: str
    target: str
    prediction: str
    right: bool
    controls: dict[str, str]  # name -> what the control answered


@dataclass(frozen=True)
class TaskExamples:
    label: str
    num_right: int
    n: int
    examples: list[Example]


def cell_examples(result: CellResult, columns: Sequence[Column]) -> list[TaskExamples]:
    """Of every task that has a column. The same rule for every cell, so nobody picked the pictures."""
    config = compose.load_config(result.evaluate_folder / "config.yaml")
    tasks = dict.fromkeys(column.task for column in columns if column.label in result.scores)
    return [_task_examples(result, config, task) for task in tasks]


def _task_examples(result: CellResult, config: Config, task: str) -> TaskExamples:
    pairs = scored_items(result.evaluate_folder, task)
    controls = {
        name: {line["id"]: line["prediction"] for line, _ in scored_items(result.evaluate_folder, task, name)}
        for name, scores in result.controls.items()
        if scores
    }
    right = [line for line, scored in pairs if scored.score >= RIGHT_FROM]
    wrong = [line for line, scored in pairs if scored.score < RIGHT_FROM]
    data = config.suite.tasks[task].data
    root = Path(config.paths.data) / data.folder / (data.images or "")
    examples = [
        Example(
            image=thumbnail(root / str(line["image"])) if line.get("image") else None,
            question=line["question"].replace(IMAGE_TOKEN, "").strip(),  # the picture stands beside it
            target=_target_text(line["target"]),
            prediction=line["prediction"],
            right=verdict,
            controls={
                name: answers[line["id"]] for name, answers in controls.items() if line["id"] in answers
            },
        )
        for verdict, lines in ((True, right), (False, wrong))
        for line in spread(lines, PER_VERDICT)
    ]
    return TaskExamples(config.suite.tasks[task].label, len(right), len(pairs), examples)


def spread(lines: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` lines from all over the list, of different images where there are enough."""
    first_of_image = list({_image_of(line): line for line in reversed(lines)}.values())[::-1]
    pool = first_of_image if len(first_of_image) >= count else list(lines)
    if len(pool) <= count:
        return pool
    return [pool[(2 * i + 1) * len(pool) // (2 * count)] for i in range(count)]


def _image_of(line: Mapping[str, Any]) -> str:
    return str(line.get("images_sha256") or line.get("image") or line["id"])


def thumbnail(path: Path) -> str | None:
    """A data URI, or None where the picture does not lie beside the records (a hub data set)."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    photograph = max(image.size) > THUMBNAIL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, options = ("jpeg", {"quality": 80}) if photograph else ("png", {"optimize": True})
    out = BytesIO()
    image.save(out, format=kind, **options)
    return f"data:image/{kind};base64,{b64encode(out.getvalue()).decode()}"


def _target_text(target: str | Sequence[str]) -> str:
    return target if isinstance(target, str) else " / ".join(dict.fromkeys(target))
