"""Published per-item outputs of other harnesses, as they lie on disk. JSON only; nothing is executed.

Read are: lmms-eval's logged samples (`<task>.json` of 0.1.x, `<date>_samples_<task>.jsonl` since), LLaVA's
answers files (`question_id`, `text`) and lines of `id` and `prediction`, such as our own predictions.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench.errors import DataError, join_problems

MAX_BYTES = 2**30  # of a file
_FORMS = "`doc_id` and `filtered_resps`, `question_id` and `text`, or `id` and `prediction`"
_SCORES: tuple[str, ...] = ("exact_match", "pope_accuracy", "mme_percetion_score", "mme_perception_score")
_SCORES += ("mme_cognition_score", "seed_all", "mmmu_acc", "score")
_OUR_METRIC = {"mme_percetion_score": "mme_perception_score", "pope_f1_score": "f1"}
_OUR_METRIC |= {f"pope_{name}": name for name in ("accuracy", "precision", "recall", "yes_ratio")}


@dataclass(frozen=True)
class Output:
    """`place`: the item's position in its split, where the harness wrote one. `score`: what it wrote of the
    item's score, as found."""

    place: int | None
    id: str
    prediction: str
    prompt: str | None = None
    target: str | None = None
    score: Any = None


def read_outputs(path: Path) -> list[Output]:
    """Raises one DataError for all lines that cannot be used."""
    outputs, problems = [], []
    for where, entry in _entries(path):
        try:
            outputs.append(_output(entry))
        except (KeyError, TypeError, ValueError) as error:
            found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            problems.append(f"{path}, {where}: expected {_FORMS}, found {found[:200]} ({error!r})")
    if problems:
        raise DataError(join_problems(problems))
    if not outputs:
        raise DataError(f"{path}: expected one output per item, found none.")
    return outputs


def read_metrics(path: Path, task: str) -> tuple[Path, dict[str, float]] | None:
    """The results file beside the outputs in `path`, and the task's metrics there under our names."""
    prefix, mark, _ = path.name.partition("_samples_")
    beside = path.with_name(f"{prefix}_results.json" if mark else "results.json")
    if not beside.is_file():
        return None
    content = _parsed(_text(beside), beside)
    tasks = content.get("results", content) if isinstance(content, dict) else {}
    found = tasks.get(task) if isinstance(tasks, dict) else None
    if not isinstance(found, dict):
        raise DataError(
            f"{beside}: expected `results` with the metrics of {task}, found "
            f"{', '.join(map(str, tasks)) or 'nothing'}. Mend the file or move it away."
        )
    metrics: dict[str, float] = {}
    for name, value in found.items():
        plain = name.partition(",")[0]  # lmms-eval: metric,filter
        if isinstance(value, int | float) and not isinstance(value, bool) and not plain.endswith("_stderr"):
            metrics[_OUR_METRIC.get(plain, plain)] = float(value)
    return beside, metrics


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, object) of every output."""
    text = _text(path)
    try:
        content = json.loads(text)
    except ValueError:  # one object a line
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, f", line {number}")
        return
    except RecursionError:
        raise DataError(f"{path}: not JSON that can be read: nested too deeply.") from None
    if isinstance(content, dict):
        content = content.get("logs", [content])
    if not isinstance(content, list):
        raise DataError(f"{path}: expected JSON lines, a list, or an object with the list `logs`.")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(content))


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path} has {size} bytes; at most {MAX_BYTES} are read.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _parsed(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}{where}: not JSON: {error}") from error


def _output(entry: Mapping[str, Any]) -> Output:
    """Raises KeyError, TypeError or ValueError for another form."""
    score = next((entry[name] for name in _SCORES if name in entry), None)
    if "doc_id" in entry:
        # `resps` is left out where a filter changed nothing
        text = _only(entry["resps"] if "resps" in entry else entry["filtered_resps"])
        target = entry.get("target")
        prompt = entry.get("input", _first_text(entry.get("arguments")))
        return Output(
            place=int(entry["doc_id"]),
            id=str(entry["doc_id"]),
            prediction=text,
            prompt=prompt if isinstance(prompt, str) else None,
            target=target if isinstance(target, str) else None,
            score=score,
        )
    if "question_id" in entry and "text" in entry:
        return Output(None, str(entry["question_id"]), _only(entry["text"]), prompt=entry.get("prompt"))
    return Output(
        None,
        str(entry["id"]),
        _only(entry["prediction"]),
        prompt=entry.get("question", entry.get("prompt")),
        score=score,
    )


def _only(response: Any) -> str:
    """lmms-eval wraps an answer into one list per request and one per repetition, or not."""
    while isinstance(response, list) and len(response) == 1:
        response = response[0]
    if not isinstance(response, str):
        raise TypeError("not one answer of text")
    return response


def _first_text(arguments: Any) -> Any:
    while isinstance(arguments, list) and arguments:
        arguments = arguments[0]
    return arguments
