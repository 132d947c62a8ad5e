"""The LightningModule: one global batch, in bins, is one optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from morebench.config import schema
from morebench.data.batch import Batch
from morebench.data.records import Sample
from morebench.models.mllm import MLLM
from morebench.training.clock import StepClock
from morebench.training.nonfinite import MicroBatchLoss, NonFinite, gathered, group_of
from morebench.training.schedule import cosine_with_warmup, num_warmup_steps
from morebench.training.sharding import Sharding
from morebench.training.signals import StopRequest
from morebench.training.told import Told


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, over all ranks and micro-batches."""

    step: int  # from 0
    loss: float  # mean over supervised tokens
    lr: float
    supervised_tokens: int
    tokens: int  # visual ones included
    padding: float  # share of positions that hold no token
    grad_norm: float  # before clipping
    data_wait: float  # seconds without a micro-batch, on the rank that had to wait longest
    peak_memory: int  # bytes, on the rank that took most
    joules: float  # of all ranks' devices since this start; NaN where a driver does not tell
    skipped: int  # optimizer steps left out so far, this one included
    told: Told


class StageModule(LightningModule):
    """`stats` describes the optimizer step just taken."""

    stats: StepStats

    def __init__(
        self,
        mllm: MLLM,
        recipe: schema.TrainRecipe,
        *,
        num_steps: int,
        first_step: int,
        sharding: Sharding,
        samples: Sequence[Sample],
        stop: StopRequest,
        skipped: Sequence[int] = (),
        nonfinite_root: Path | None = None,
    ) -> None:
        super().__init__()
        self.mllm = mllm
        self.recipe = recipe
        self.num_steps = num_steps
        self.next_step = first_step
        self.sharding = sharding
        self._warmup_steps = num_warmup_steps(num_steps, recipe.warmup_ratio)
        self.nonfinite = NonFinite(samples, recipe.max_skipped_steps, skipped, nonfinite_root)
        self.tell: Callable[[], Told] = lambda: Told(stop=stop.signal_name is not None)
        self.clock = StepClock()
        self._seen: list[tuple[Tensor, Batch]] = []

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters the optimizer holds, in its order; tied weights once."""
        return {name: value for name, value in self.mllm.named_parameters() if value.requires_grad}

    def configure_model(self) -> None:
        self.sharding.place(self.mllm, self.recipe.precision)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        facts = self.recipe.optimizer
        return torch.optim.AdamW(
            self.trained().values(),
            lr=facts.lr,
            betas=(facts.betas[0], facts.betas[1]),
            eps=facts.eps,
            weight_decay=facts.weight_decay,
            fused=True,  # one pass instead of a dozen; a fifth of the time on the CPU
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.mllm(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss_sum: Tensor = self.mllm(batch)
        self._seen.append((loss_sum.detach(), batch))
        # a global batch without any supervised token (all truncated) is a step without a gradient
        return loss_sum * (self.sharding.loss_factor / batch.num_supervised.clamp(min=1))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        seen, self._seen = self._seen, []
        trained = self.trained()
        grad_norm = self.sharding.grad_norm(trained)
        on_device = [
            torch.stack([loss for loss, _ in seen]).double().sum(),
            torch.stack([batch.cu_seqlens[-1] for _, batch in seen]).double().sum(),
        ]
        known_here = [
            self.clock.data_wait,
            self.clock.peak_memory(),
            sum(batch.input_ids.numel() for _, batch in seen),
            self.clock.joules(),
            *self.tell(),
        ]
        ranks = self._of_all_ranks(
            torch.cat([torch.stack(on_device), grad_norm.new_tensor(known_here, dtype=torch.float64)])
        )
        totals = ranks.sum(dim=0)
        loss_sum, tokens, _, _, positions, joules, *told = totals.tolist()
        data_wait, peak_memory = ranks[:, 2:4].amax(dim=0).tolist()
        supervised = int(seen[0][1].num_supervised)
        lr = self.recipe.optimizer.lr * cosine_with_warmup(self.next_step, self.num_steps, self._warmup_steps)
        is_finite = bool(torch.isfinite(totals[0] + grad_norm))  # the same on all ranks
        if not is_finite:
            self._note_nonfinite(seen, loss_sum / max(1, supervised), float(grad_norm))
            self.sharding.leave_out(optimizer, trained)
        elif self.recipe.gradient_clip_val is not None:
            # not left to Lightning: it refuses a fused optimizer in bf16, and would sum the norm again
            self.sharding.clip(trained, self.recipe.gradient_clip_val, grad_norm)
        self.stats = StepStats(
            step=self.next_step,
            loss=loss_sum / max(1, supervised),
            lr=lr,
            supervised_tokens=supervised,
            tokens=int(tokens),
            padding=1.0 - tokens / positions if positions else 0.0,
            grad_norm=float(grad_norm),
            data_wait=data_wait,
            peak_memory=int(peak_memory),
            joules=joules,
            skipped=len(self.nonfinite.skipped),
            told=Told.of(told),
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.next_step += 1

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss summed over the batch's targets."""
        loss_sum: Tensor = self.mllm(batch)
        return loss_sum

    def on_fit_start(self) -> None:
        self.clock.start(self.trainer.strategy.root_device)

    def on_train_epoch_start(self) -> None:  # after the dry step
        self.clock.step_begins()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.clock.batch_begins()

    def on_before_backward(self, loss: Tensor) -> None:
        self.clock.backward_begins()

    def on_after_backward(self) -> None:
        self.clock.backward_ends()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After that of the callbacks, which save and validate."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            self.clock.batch_ends()
        else:
            self.clock.step_begins()

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """[N] -> [ranks, N]: one message in place of one for the sums and one for the maxima."""
        if self.trainer.world_size == 1:
            return values[None]
        of_all = values.new_empty(self.trainer.world_size, len(values))
        torch.distributed.all_gather_into_tensor(of_all.view(-1), values)
        return of_all

    def _note_nonfinite(self, seen: Sequence[tuple[Tensor, Batch]], loss: float, grad_norm: float) -> None:
        """Raises NonFiniteError on all ranks, or on none."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        mine = [MicroBatchLoss(rank, float(sum_), batch.sample_ids.tolist()) for sum_, batch in seen]
        groups = groupby(self.trained().items(), lambda item: group_of(item[0]))
        norms = {name: float(self.sharding.grad_norm(dict(members))) for name, members in groups}
        self.nonfinite.note(self.next_step, loss, grad_norm, gathered(mine, world_size), norms)
