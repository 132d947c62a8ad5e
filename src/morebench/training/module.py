"""The LightningModule: one global batch, in bins, is one optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from morebench.config import schema
from morebench.data.batch import Batch
from morebench.data.records import Sample
from morebench.errors import NonFiniteError
from morebench.models.mllm import MLLM
from morebench.training.schedule import cosine_with_warmup, num_warmup_steps
from morebench.training.sharding import Sharding
from morebench.training.signals import StopRequest


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
    stop: bool  # some rank was asked to stop


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
    ) -> None:
        super().__init__()
        self.mllm = mllm
        self.recipe = recipe
        self.num_steps = num_steps
        self.next_step = first_step
        self.sharding = sharding
        self._warmup_steps = num_warmup_steps(num_steps, recipe.warmup_ratio)
        self._samples = samples
        self._stop = stop
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
        totals = torch.stack(
            [
                torch.stack([loss for loss, _ in seen]).double().sum(),
                torch.stack([batch.cu_seqlens[-1] for _, batch in seen]).double().sum(),
                grad_norm.new_tensor(sum(batch.input_ids.numel() for _, batch in seen), dtype=torch.float64),
                grad_norm.new_tensor(self._stop.signal_name is not None, dtype=torch.float64),
            ]
        )
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        loss_sum, tokens, positions, stop = totals.tolist()
        supervised = int(seen[0][1].num_supervised)
        lr = self.recipe.optimizer.lr * cosine_with_warmup(self.next_step, self.num_steps, self._warmup_steps)
        self.stats = StepStats(
            step=self.next_step,
            loss=loss_sum / max(1, supervised),
            lr=lr,
            supervised_tokens=supervised,
            tokens=int(tokens),
            padding=1.0 - tokens / positions if positions else 0.0,
            grad_norm=float(grad_norm),
            stop=stop > 0,
        )
        if not torch.isfinite(totals[0] + grad_norm):
            raise NonFiniteError(self._blame(seen))
        if self.recipe.gradient_clip_val is not None:
            # not left to Lightning: it refuses a fused optimizer in bf16, and would sum the norm again
            self.sharding.clip(trained, self.recipe.gradient_clip_val, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.next_step += 1

    def _blame(self, seen: Sequence[tuple[Tensor, Batch]]) -> str:
        bad = [batch for loss, batch in seen if not torch.isfinite(loss)]
        ids = torch.cat([batch.sample_ids for batch in bad or [batch for _, batch in seen]]).tolist()
        shown = ", ".join(self._samples[number].id for number in ids[:16])
        return (
            f"Optimizer step {self.stats.step}: loss {self.stats.loss}, gradient norm "
            f"{self.stats.grad_norm}. {'Non-finite loss in' if bad else 'In'} {len(ids)} samples: {shown}"
            f"{', ...' if len(ids) > 16 else ''}. This step changed no weight. Look at these samples, or "
            "lower optimizer.lr."
        )
