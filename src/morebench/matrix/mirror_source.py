"""What a run folder has to tell MLflow: names, params, metric points, artefacts. Only reads."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from morebench.matrix.ledger import DONE, State, read_json, state, write_json
from morebench.matrix.mirror_store import redact

# Hidden, because DONE lists every other file of the folder as an artefact of the run.
NAMES_FILE = ".mirror.json"
ARTEFACTS = ("cell.json", "config.yaml", "manifest.json", "parents.json", "results.json", "table.*")
MAX_PARAM_LENGTH = 500  # characters; MLflow itself refuses more than 6,000
STATUS = {State.done: "FINISHED", State.failed: "FAILED", State.interrupted: "KILLED"}


@dataclass(frozen=True)
class Names:
    """Where a run hangs in MLflow; kept in the run folder, so that `sync` parses no name."""

    cell: str
    step: str
    experiment: str | None


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    step: int
    elapsed_ms: int  # optimizer steps so far; pauses between resumes are left out


def read_names(folder: Path) -> Names | None:
    """None: no Mirror was ever started for this folder."""
    found = read_json(folder / NAMES_FILE)
    return None if found is None else Names(**found)


def write_names(folder: Path, names: Names) -> None:
    write_json(folder / NAMES_FILE, asdict(names))


class MetricsTail:
    """Yields what was appended to metrics.jsonl since the last call, whole lines only.

    A resume cuts the file back to its checkpoint: then everything is yielded again, and the caller, who knows
    what MLflow holds, leaves out what is there.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "metrics.jsonl"
        self._offset = 0
        self._seconds = 0.0

    def new_points(self) -> Iterator[Point]:
        if not self._file.is_file():
            return
        with self._file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < self._offset:
                self._offset, self._seconds = 0, 0.0
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield from self._points(line)

    def _points(self, line: bytes) -> Iterator[Point]:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            return  # torn by a crash; the resumed run writes that step again
        self._seconds += float(entry.get("step_s") or 0.0)
        for key, value in entry.items():
            if key != "step" and _is_number(value):
                yield Point(metric_name(f"train/{key}"), float(value), step, round(1000 * self._seconds))


def result_metrics(folder: Path) -> dict[str, float]:
    """`eval/<task>/<metric>` and `eval/<control>/<task>/<metric>` of results.json, `run/<total>` of a train
    step's manifest.
    """
    return {**_run_metrics(folder), **_eval_metrics(folder)}


def _run_metrics(folder: Path) -> dict[str, float]:
    manifest = _read_mapping(folder / "manifest.json")
    if "training" not in manifest:  # not trained to the end
        return {}
    costs = {key: manifest.get(key) for key in ("seconds", "gpu_hours", "energy_kwh", "planned_flops")}
    found = {**costs, **manifest["training"]}
    return {metric_name(f"run/{key}"): float(value) for key, value in found.items() if _is_number(value)}


def _eval_metrics(folder: Path) -> dict[str, float]:
    results = _read_mapping(folder / "results.json")
    groups = {"eval": results.get("tasks", {})}
    groups |= {f"eval/{control}": tasks for control, tasks in results.get("controls", {}).items()}
    return {
        metric_name(f"{group}/{task}/{metric}"): float(value)
        for group, tasks in groups.items()
        for task, result in tasks.items()
        for metric, value in result["metrics"].items()
        if _is_number(value)
    }


def cell_params(folder: Path) -> dict[str, str]:
    """Axes and seed."""
    return _flatten(_read_mapping(folder / "cell.json"))


def step_params(folder: Path, step: str) -> dict[str, str]:
    """Axes, seed and the values of this step's recipe; empty while config.yaml is not written yet."""
    config = _read_mapping(folder / "config.yaml")
    if not config:
        return {}
    parts = {"projector": config["projector"], "scales": config["resolution"]["scales"]}
    return cell_params(folder) | _flatten(config["stage"][step]) | _flatten(parts)


def artefacts(folder: Path) -> dict[str, str]:
    """Name -> text without credentials (config.yaml may hold a tracking URI with a password)."""
    files = sorted(file for pattern in ARTEFACTS for file in folder.glob(pattern))
    return {file.name: redact(file.read_text(errors="replace")) for file in files}


def status_on_disk(folder: Path) -> str | None:
    """None: running, or never started."""
    return STATUS.get(state(folder))


def started_ms(folder: Path) -> int | None:
    return _modified_ms(folder / NAMES_FILE)


def ended_ms(folder: Path) -> int | None:
    return _modified_ms(folder / DONE)


def results_ms(folder: Path) -> int:
    return max(_modified_ms(folder / name) or 0 for name in ("results.json", "manifest.json"))


def content_digest(folder: Path, status: str | None) -> str:
    """Over everything that is mirrored: `sync` skips a run whose digest MLflow already carries."""
    digest = sha256(str(status).encode())
    for pattern in ("metrics.jsonl", *ARTEFACTS):
        for file in sorted(folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def metric_name(text: str) -> str:
    """MLflow refuses a whole batch for one character outside this set."""
    return re.sub(r"[^\w./ -]", "_", text)


def _modified_ms(file: Path) -> int | None:
    return file.stat().st_mtime_ns // 1_000_000 if file.exists() else None


def _read_mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return dict(read_json(file) if file.suffix == ".json" else yaml.safe_load(file.read_text()) or {})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[metric_name(f"{prefix}{key}")] = redact(str(value))[:MAX_PARAM_LENGTH]
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
