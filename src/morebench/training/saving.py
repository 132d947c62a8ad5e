"""When a checkpoint is written: every n optimizer steps, and when asked to stop."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from morebench.errors import Interrupted
from morebench.training.fragments import Fragment, read_whole, whole
from morebench.training.module import StageModule
from morebench.training.resume import Checkpoint, save_checkpoint
from morebench.training.signals import StopRequest
from morebench.training.telemetry import MetricsFile


class Saver(Callback):
    """`metrics` is None on every rank but the first, which alone writes."""

    def __init__(
        self,
        root: Path,
        every_n_steps: int,
        stop: StopRequest,
        metrics: MetricsFile | None,
        choices: Mapping[str, Any],
        started: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._root = root
        self._every_n_steps = every_n_steps
        self._stop = stop
        self._metrics = metrics
        self._choices = choices
        self._started = started
        self._checkpoint = checkpoint

    def seconds(self) -> float:
        """Of this run so far; `started` lies as far back as its checkpoint's earlier starts took."""
        return time.monotonic() - self._started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here, because only now parameters and optimizer lie where the strategy puts them."""
        assert isinstance(pl_module, StageModule)
        self._stop.install()
        self._stop.let_through()
        if self._checkpoint is not None:
            parameters, state = self._checkpoint.pieces("parameters"), self._checkpoint.pieces("optimizer")
            pl_module.sharding.restore(trainer.optimizers[0], pl_module.trained(), parameters, state)
            # making the loader's iterator drew a number
            torch.set_rng_state(read_whole(self._checkpoint.pieces("random"), "cpu"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, StageModule)
        done = pl_module.stats.step + 1
        if done == pl_module.num_steps:  # the trained parts are written next
            return
        stop = pl_module.stats.stop
        if stop or done % self._every_n_steps == 0:
            self._save(trainer, pl_module, done)
        if stop:
            trainer.strategy.barrier()  # nobody leaves before the save is whole
            raise Interrupted(
                f"{self._stop.signal_name or 'A signal on another rank'} asked to stop: saved after {done} "
                f"of {pl_module.num_steps} optimizer steps. Start again to continue."
            )

    def _save(self, trainer: Trainer, module: StageModule, done: int) -> None:
        if self._metrics is None:
            return
        self._metrics.sync()
        trained = module.trained()
        tensors: dict[str, Mapping[str, Fragment]] = {
            "parameters": module.sharding.parameters(trained),
            "optimizer": module.sharding.optimizer_state(trainer.optimizers[0], trained),
            "random": {"cpu": whole(torch.get_rng_state())},
        }
        save_checkpoint(
            self._root, done, tensors, {"choices": dict(self._choices), "seconds": self.seconds()}
        )
