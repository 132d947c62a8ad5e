"""From predictions to scores/ and results.json. No torch: scoring again takes seconds on any machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from morebench.config.schema import Profile
from morebench.evaluation.anomalies import anomalies
from morebench.evaluation.predictions import Line, write_lines
from morebench.evaluation.scoring import score_items
from morebench.evaluation.sheets import Sheet
from morebench.training.fence import Fence
from morebench.training.files import write_atomically

JUDGE = "judge"  # folder of a judge's replies, which are asked for once


def score(
    sheets: Sequence[Sheet],
    lines: Sequence[Sequence[Line]],
    profile: Profile,
    folder: Path,
    fence: Fence,
    speeds: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write scores/; `tasks` and `controls` of results.json. Raises JudgeError; the next call asks the rest.

    `lines`: of every sheet, in record order. `speeds`: of its file, by that file's name.
    """
    tasks: dict[str, Any] = {}
    controls: dict[str, dict[str, Any]] = {}
    for sheet, own in zip(sheets, lines, strict=True):
        fence()
        found = tasks if sheet.control is None else controls.setdefault(sheet.control, {})
        found[sheet.task.name] = {
            **_score(sheet, own, profile, folder),
            **speeds.get(sheet.file, {"seconds": None, "questions_per_s": None}),
        }
    return {"tasks": tasks, "controls": controls}


def write_results(folder: Path, content: Mapping[str, Any]) -> None:
    write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")


def _score(sheet: Sheet, lines: Sequence[Line], profile: Profile, folder: Path) -> dict[str, Any]:
    task = sheet.task
    answered = [(line["prediction"], item.record) for line, item in zip(lines, task.items, strict=True)]
    scored = score_items(task.benchmark, answered, profile, folder / JUDGE / sheet.file)
    (folder / "scores").mkdir(exist_ok=True)
    write_lines(
        folder / "scores" / sheet.file,
        ({"id": item.id, **asdict(one)} for item, one in zip(task.items, scored, strict=True)),
    )
    return {
        "n": len(scored),
        "metrics": task.benchmark.aggregate(scored, profile),
        "max_new_tokens": task.max_new_tokens,
        "images": sheet.num_images,
        "source": asdict(task.source),
        "warnings": task.benchmark.warnings(scored),
        "anomalies": anomalies(lines, scored),
    }
