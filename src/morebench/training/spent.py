"""What a run has cost and done, over all its starts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from morebench.training.files import read_manifest

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Spent:
    """Lost work is counted: of a start that was killed, all until its last line in metrics.jsonl."""

    seconds: float = 0.0
    gpu_hours: float | None = None  # None: no GPU was held
    energy_kwh: float | None = None  # of the GPUs; None where a driver did not tell, for a part of it too

    def and_then(self, seconds: float, num_gpus: int, joules: float) -> "Spent":
        """`joules` is NaN where it is not known."""
        hours = seconds * num_gpus / 3600
        unknown = math.isnan(joules) or (self.seconds > 0 and self.energy_kwh is None)
        return Spent(
            seconds=self.seconds + seconds,
            gpu_hours=(self.gpu_hours or 0.0) + hours if num_gpus else self.gpu_hours,
            energy_kwh=None if unknown else (self.energy_kwh or 0.0) + joules / _JOULES_PER_KWH,
        )


def spent_before(folder: Path, metrics: Path) -> Spent:
    """By earlier starts. What is later cut from the metrics is kept in the manifest by `_begin_manifest`."""
    return max(
        (_spent(facts) for facts in (read_manifest(folder), *read_lines(metrics)[-1:])),
        key=lambda spent: spent.seconds,
    )


def _spent(facts: Mapping[str, Any]) -> Spent:
    return Spent(facts.get("seconds") or 0.0, facts.get("gpu_hours"), facts.get("energy_kwh"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a kill may have cut the last one short."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


def totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the steps that made the weights; each is once in `lines`, whatever was killed and done again."""
    seconds = sum(line["step_s"] for line in lines)
    rates = [line["tokens_per_s"] for line in lines]
    mfu = [line["mfu"] for line in lines]
    is_known = bool(mfu) and None not in mfu
    losses = [line["validation_loss"] for line in lines if line["validation_loss"] is not None]
    return {
        "steps": len(lines),
        "step_seconds": round(seconds, 3),
        "tokens": sum(line["tokens"] for line in lines),
        "supervised_tokens": sum(line["supervised_tokens"] for line in lines),
        "flops": sum(line["flops"] for line in lines),
        "tokens_per_s": round(sum(line["tokens"] for line in lines) / seconds, 1) if lines else None,
        "tokens_per_s_median": median(rates) if lines else None,
        "mfu": round(sum(line["mfu"] * line["step_s"] for line in lines) / seconds, 4) if is_known else None,
        "mfu_median": median(mfu) if is_known else None,
        "data_wait_share": round(sum(line["data_wait_s"] for line in lines) / seconds, 4) if lines else None,
        "peak_memory_gib": max((line["peak_memory_gib"] for line in lines), default=None),
        "validation_loss": losses[-1] if losses else None,
    }
