"""metrics.jsonl: one line per optimizer step, the truth that trackers copy from."""

import json
import os
import time
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule, Trainer

from morebench.progress import Progress
from morebench.training.files import disk_full_named, write_atomically
from morebench.training.module import StageModule


class MetricsFile:
    """Appends from `first_step` on; lines a killed run wrote past its checkpoint are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._first_step = first_step

    def __enter__(self) -> Self:
        kept = lines_before(self._path, self._first_step)
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        with disk_full_named(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force all lines to the disk: a checkpoint must not be ahead of its metrics."""
        with disk_full_named(self._path):
            os.fsync(self._file.fileno())


def lines_before(path: Path, first_step: int) -> list[str]:
    """Whole lines of steps < first_step; a kill may have cut the last line short."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
        if step < first_step:
            kept.append(line)
    return kept


class Telemetry(Callback):
    """On rank 0 only; the module has already summed over ranks."""

    def __init__(self, metrics: MetricsFile, progress: Progress) -> None:
        self._metrics = metrics
        self._progress = progress
        self._waited = 0.0

    def on_train_epoch_start(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:  # after the dry step
        self._step_began = self._batch_ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_ended = now = time.perf_counter()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, StageModule)
        stats = pl_module.stats
        seconds = now - self._step_began
        rate = stats.tokens / seconds
        self._metrics.append(
            {
                "step": stats.step,
                "loss": stats.loss if isfinite(stats.loss) else None,
                "lr": stats.lr,
                "supervised_tokens": stats.supervised_tokens,
                "tokens": stats.tokens,
                "tokens_per_s": round(rate, 1),
                "padding": stats.padding,
                "data_wait_s": round(self._waited, 6),
                "step_s": round(seconds, 6),
                "grad_norm": stats.grad_norm if isfinite(stats.grad_norm) else None,
                "skipped": stats.skipped,
            }
        )
        self._progress.update(stats.step + 1, f"loss {stats.loss:.4f}, {rate:,.0f} tokens/s")
        self._waited = 0.0
        self._step_began = now
