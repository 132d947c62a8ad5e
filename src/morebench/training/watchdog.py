"""Ends a run in which nothing happens any more: a rank that waits for a lost one waits for ever."""

import faulthandler
import multiprocessing
import os
import sys
import threading
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.constants import default_pg_timeout

from morebench.config import schema
from morebench.errors import EXIT_INTERRUPTED

# Loading weights, hashing a checkpoint, the dry step, compiling: a first optimizer step may take so many
# times what later ones may.
_FIRST = 4
_TICKS = 50  # looks per timeout
_STDERR = 2  # the descriptor, whatever sys.stderr has become: it leads to the run's log


def group_timeout(machine: schema.Trainer) -> timedelta | None:
    """For collectives; later than the watchdog, which says more. Without one it is the library's own."""
    minutes = machine.hang_timeout_minutes
    return timedelta(minutes=(_FIRST + 1) * minutes) if minutes else default_pg_timeout


class Watchdog(Callback):
    """While entered, ends the process with exit code 75 after `minutes` without a `beat`; 0: never.

    Beats are the arrival and the end of every micro-batch, and whatever else takes long and gets on. Only
    time in which this process ran counts: one that was stopped for an hour and goes on has not hung.
    """

    def __init__(self, minutes: float, rank: int) -> None:
        self._seconds = 60 * minutes
        self._rank = rank
        self._limit = _FIRST * self._seconds
        self._where = "starting"
        self._quiet = 0.0  # seconds without a beat
        self._end = threading.Event()

    def beat(self, where: str) -> None:
        """`where`: what begins now."""
        self._where, self._quiet = where, 0.0

    def __enter__(self) -> Self:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.beat(f"computing micro-batch {batch_idx} of this start")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.beat(f"after micro-batch {batch_idx} of this start: saving, or waiting for the next")
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._limit = self._seconds

    def _watch(self) -> None:
        # counted in looks, not read from a clock
        tick = self._seconds / _TICKS
        while not self._end.wait(tick):
            self._quiet += tick
            if self._quiet >= self._limit:
                self._give_up()

    def _give_up(self) -> None:
        text = (
            f"Rank {self._rank} has got nowhere for {self._quiet / 60:.3g} min ({self._where}); "
            "trainer.hang_timeout_minutes allows no more. The run ends here, and its next start continues "
            "from the last checkpoint. What every thread was doing:\n"
        )
        sys.stderr.flush()
        os.write(_STDERR, text.encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        for child in multiprocessing.active_children():  # data workers, which may be what hangs
            child.kill()
        os._exit(EXIT_INTERRUPTED)  # nothing that waits for other ranks may run
