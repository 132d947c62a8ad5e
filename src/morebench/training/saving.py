"""When a checkpoint is written: every n optimizer steps or minutes, and when asked to stop.

A checkpoint is taken at the end of an optimizer step: its tensors are copied, and a thread writes the copy
while training goes on. Ranks tell each other how far they are in the sum of the step's statistics
(`Told`), so that none of this costs a collective of its own.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from morebench.errors import DiskFullError, Interrupted, MorebenchError
from morebench.training.fence import Fence, unfenced
from morebench.training.fragments import Fragment, Pieces, read_whole, whole
from morebench.training.module import StageModule
from morebench.training.resume import Checkpoint
from morebench.training.signals import StopRequest
from morebench.training.telemetry import MetricsFile
from morebench.training.told import Told, agree
from morebench.training.writing import Writer, remove_leftovers

_POLL_S = 0.5  # between looks at the writers of the other ranks


@dataclass
class Pace:
    """When the next checkpoint is due. Monotonic: no change of the machine's clock moves it."""

    every_n_steps: int
    every_n_minutes: float
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)
    _owed: bool = False  # was due while another one was being written

    def __post_init__(self) -> None:
        self._last = self.clock()

    def is_due(self, done: int) -> bool:
        """Asked once after each optimizer step; stays so until `taken`."""
        late = self.clock() - self._last >= 60 * self.every_n_minutes
        self._owed = self._owed or late or done % self.every_n_steps == 0
        return self._owed

    def taken(self) -> None:
        self._owed, self._last = False, self.clock()


class Saver(Callback):
    """`metrics` is None on every rank but the first, whose clock decides."""

    def __init__(
        self,
        root: Path,
        pace: Pace,
        stop: StopRequest,
        metrics: MetricsFile | None,
        choices: Mapping[str, Any],
        started: float,
        checkpoint: Checkpoint | None,
        fence: Fence = unfenced,
        beat: Callable[[str], None] = lambda where: None,
    ) -> None:
        self._root = root
        self._pace = pace
        self._stop = stop
        self._metrics = metrics
        self._choices = choices
        self._started = started
        self._checkpoint = checkpoint
        self._fence = fence
        self._beat = beat
        self._writer: Writer | None = None

    def seconds(self) -> float:
        """Of this run so far; `started` lies as far back as its checkpoint's earlier starts took."""
        return time.monotonic() - self._started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here, because only now parameters and optimizer lie where the strategy puts them."""
        assert isinstance(pl_module, StageModule)
        self._stop.install()
        self._stop.let_through()
        pl_module.tell = lambda: self._tell(pl_module.next_step + 1)
        self._open_writer(trainer)
        if self._checkpoint is not None:
            parameters, state = self._checkpoint.pieces("parameters"), self._checkpoint.pieces("optimizer")
            pl_module.sharding.restore(trainer.optimizers[0], pl_module.trained(), parameters, state)
            # making the loader's iterator drew a number
            _restore_random(self._checkpoint.pieces("random"), trainer.global_rank, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, StageModule)
        writer, told = self._writer, pl_module.stats.told
        assert writer is not None
        done, last = pl_module.stats.step + 1, pl_module.num_steps
        self._raise_failure(told)
        if not told.busy:
            writer.advance()
        if told.stop or done == last:
            self._drain(trainer, pl_module)
        if done == last:  # the trained parts are written next
            return
        if told.save or told.stop:
            self._save(trainer, pl_module, done)
        if told.stop:
            self._drain(trainer, pl_module)  # nobody leaves before the save is whole
            raise Interrupted(
                f"{self._stop.signal_name or 'A signal on another rank'} asked to stop: saved after {done} "
                f"of {last} optimizer steps. Start again to continue."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A checkpoint that was good when it was begun is kept, where no rank waits for another in vain."""
        assert isinstance(pl_module, StageModule)
        if self._writer is not None and (trainer.world_size == 1 or pl_module.nonfinite.is_over):
            with suppress(MorebenchError, OSError):  # what it is about has been raised already
                self._drain(trainer, pl_module)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open_writer(self, trainer: Trainer) -> None:
        token = trainer.strategy.broadcast(f"{time.monotonic_ns():x}-{id(self):x}")
        if trainer.is_global_zero:
            remove_leftovers(self._root)
        self._writer = Writer(self._root, token, trainer.global_rank, trainer.world_size, self._fence)

    def _tell(self, done: int) -> Told:
        """What this rank has to say at the end of an optimizer step."""
        writer = self._writer
        assert writer is not None
        is_first = self._metrics is not None
        is_due = is_first and self._pace.is_due(done)
        is_busy = writer.is_busy  # before its error: it may end in between
        error = writer.error
        return Told(
            stop=self._stop.signal_name is not None,
            save=is_due and not writer.is_pending,
            busy=is_busy,
            failed=error is not None,
            full=isinstance(error, DiskFullError),
        )

    def _save(self, trainer: Trainer, module: StageModule, done: int) -> None:
        assert self._writer is not None
        if len(module.nonfinite.skipped) == done:
            return  # all steps were left out: this is the start, and the optimizer has no state yet
        trained = module.trained()
        tensors: dict[str, Mapping[str, Fragment]] = {
            "parameters": module.sharding.parameters(trained),
            "optimizer": module.sharding.optimizer_state(trainer.optimizers[0], trained),
            "random": _random(trainer.global_rank, module.device),
        }
        facts = {
            "choices": dict(self._choices),
            "seconds": self.seconds(),
            "skipped": list(module.nonfinite.skipped),
        }
        # a checkpoint must not be ahead of its metrics
        before = self._metrics.sync if self._metrics is not None else None
        self._writer.write(done, tensors, facts, before)
        self._pace.taken()

    def _drain(self, trainer: Trainer, module: StageModule) -> None:
        """Wait on all ranks until what is being written is committed, or raise on all."""
        writer = self._writer
        assert writer is not None
        seen = -1
        while True:
            writer.wait(_POLL_S)
            is_busy, moved = writer.is_busy, writer.progress != seen
            error, seen = writer.error, writer.progress
            told = agree(
                Told(
                    busy=is_busy,
                    pending=writer.is_pending,
                    moved=moved,
                    failed=error is not None,
                    full=isinstance(error, DiskFullError),
                ),
                trainer.world_size,
                module.device,
            )
            if told.moved:
                self._beat("waiting for a checkpoint to be written")
            self._raise_failure(told)
            if not told.pending:
                return
            if not told.busy:
                writer.advance()

    def _raise_failure(self, told: Told) -> None:
        assert self._writer is not None
        if not told.failed:
            return
        if (error := self._writer.error) is not None:
            raise error
        kind = DiskFullError if told.full else MorebenchError
        raise kind("Another rank could not write its part of a checkpoint; its log says why.")


def _random(rank: int, device: torch.device) -> dict[str, Fragment]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"{name}/{rank}": whole(state) for name, state in states.items()}


def _restore_random(pieces: Pieces, rank: int, device: torch.device) -> None:
    """A rank that was not there before takes the first one's."""

    def state(name: str) -> Tensor | None:
        found = [key for key in (f"{name}/{rank}", f"{name}/0") if key in pieces.shapes]
        return read_whole(pieces, found[0]) if found else None

    if (cpu := state("cpu")) is not None:
        torch.set_rng_state(cpu)
    if device.type == "cuda" and (cuda := state("cuda")) is not None:
        torch.cuda.set_rng_state(cuda, device)
