"""metrics.jsonl: one line per optimizer step, the truth that trackers copy from."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from morebench.config.gpus import gpu_called
from morebench.progress import Progress
from morebench.training.clock import Timing
from morebench.training.files import disk_full_named, write_atomically
from morebench.training.module import StageModule, StepStats
from morebench.training.spent import Spent, read_lines
from morebench.training.validation import Validation


class MetricsFile:
    """Appends from `first_step` on; lines a killed run wrote past its checkpoint are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._first_step = first_step

    def __enter__(self) -> Self:
        kept = [line for line in read_lines(self._path) if line["step"] < self._first_step]
        write_atomically(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))
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


@dataclass(frozen=True)
class Expense:
    """What turns seconds into shares and costs."""

    flops: Callable[[int], int]  # of an optimizer step's global batch
    peak_tflops: float | None  # of one device; None: not known
    num_gpus: int  # of all ranks
    before: Spent  # by earlier starts
    started: float  # of time.monotonic()

    def so_far(self, joules: float) -> Spent:
        return self.before.and_then(time.monotonic() - self.started, self.num_gpus, joules)


class Telemetry(Callback):
    """A line for every optimizer step. `metrics` and `progress` are None on every rank but the first."""

    def __init__(
        self,
        expense: Expense,
        validation: Validation | None,
        metrics: MetricsFile | None,
        progress: Progress | None,
    ) -> None:
        self._expense = expense
        self._validation = validation
        self._metrics = metrics
        self._progress = progress

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, StageModule)
        timing, stats, validation_loss = pl_module.clock.step_ends(), pl_module.stats, None
        if self._validation is not None and self._validation.is_due(stats.step):
            validation_loss = self._validation.loss(trainer, pl_module)
        if self._metrics is None or self._progress is None:
            return
        line = self._line(stats, timing, trainer.world_size, validation_loss)
        self._metrics.append(line)
        mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
        self._progress.update(
            stats.step + 1, f"loss {stats.loss:.4f}, {line['tokens_per_s']:,.0f} tokens/s{mfu}"
        )

    def _line(
        self, stats: StepStats, timing: Timing, world_size: int, validation_loss: float | None
    ) -> dict[str, Any]:
        flops, peak = self._expense.flops(stats.step), self._expense.peak_tflops
        tflops = flops / timing.step / world_size / 1e12
        return {
            "step": stats.step,
            "loss": stats.loss if isfinite(stats.loss) else None,
            "validation_loss": validation_loss,
            "lr": stats.lr,
            "supervised_tokens": stats.supervised_tokens,
            "tokens": stats.tokens,
            "tokens_per_s": round(stats.tokens / timing.step, 1),
            "supervised_tokens_per_s": round(stats.supervised_tokens / timing.step, 1),
            "flops": flops,
            "tflops": float(f"{tflops:.4g}"),
            "mfu": None if peak is None else round(tflops / peak, 4),
            "padding": stats.padding,
            "data_wait_s": round(stats.data_wait, 6),
            "forward_s": round(timing.forward, 6),
            "backward_s": round(timing.backward, 6),
            "optimizer_s": None if timing.optimizer is None else round(timing.optimizer, 6),
            "step_s": round(timing.step, 6),
            "peak_memory_gib": round(stats.peak_memory / 2**30, 3),
            "grad_norm": stats.grad_norm if isfinite(stats.grad_norm) else None,
            "skipped": stats.skipped,
            **asdict(self._expense.so_far(stats.joules)),
        }


def device_peak(device: torch.device) -> float | None:
    """TFLOP/s in bf16, from conf/gpus; None for a device that has no file there."""
    found = gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if found is None else found.bf16_tflops
