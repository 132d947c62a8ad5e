"""What answering has cost over all starts of an evaluate step: in its manifest, as it goes."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morebench.training.files import read_manifest, update_manifest

_SAVED_EVERY_S = 30.0  # what a kill may lose


class Spent:
    """`facts`: what else is known from the start on."""

    def __init__(self, folder: Path, num_gpus: int, facts: Mapping[str, Any]) -> None:
        self._folder, self._num_gpus = folder, num_gpus
        self.facts = dict(facts)
        manifest = read_manifest(folder)
        self._before = float(manifest.get("seconds") or 0.0)
        self._gpu_hours_before = float(manifest.get("gpu_hours") or 0.0)
        self._answering: dict[str, dict[str, float]] = dict(manifest.get("answering", {}))
        self._started, self._saved = time.monotonic(), -_SAVED_EVERY_S

    @property
    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._started, 3)

    def count(self, file: str, answers: int, seconds: float) -> None:
        """`seconds` of one device."""
        before = self._answering.get(file, {"answers": 0, "seconds": 0.0})
        self._answering[file] = {
            "answers": before["answers"] + answers,
            "seconds": round(before["seconds"] + seconds, 4),
        }

    def save(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._saved < _SAVED_EVERY_S:
            return
        self._saved = time.monotonic()
        hours = (time.monotonic() - self._started) * self._num_gpus / 3600
        update_manifest(
            self._folder,
            {
                **self.facts,
                "seconds": self.seconds,
                "gpu_hours": self._gpu_hours_before + hours,
                "answering": self._answering,
            },
        )

    def speeds(self) -> dict[str, dict[str, float | None]]:
        return speeds(self._answering)


def speeds(answering: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """File of predictions/ -> the seconds that one device took for it, and its pace."""
    return {
        file: {
            "seconds": round(counted["seconds"], 3),
            "questions_per_s": round(counted["answers"] / counted["seconds"], 2)
            if counted["seconds"]
            else None,
        }
        for file, counted in answering.items()
    }
