"""The training itself: the Trainer of Lightning with all that is ours hung in, from first step to last."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from morebench.config.schema import Attention
from morebench.data.datamodule import Loader, dead_workers_named
from morebench.errors import Interrupted
from morebench.progress import Progress
from morebench.training.choices import Choices
from morebench.training.choosing import apply_choices
from morebench.training.dry_step import DryStep, memory_named
from morebench.training.fence import Fence
from morebench.training.module import StageModule
from morebench.training.resume import Checkpoint
from morebench.training.saving import Pace, Saver
from morebench.training.signals import StopRequest
from morebench.training.spent import Spent
from morebench.training.stage import Stage
from morebench.training.strategy import sharding_of
from morebench.training.telemetry import Expense, MetricsFile, Telemetry, device_peak
from morebench.training.validation import Validation
from morebench.training.watchdog import Watchdog

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
NONFINITE = "nonfinite"


@dataclass(frozen=True)
class Start:
    """One start of a run: what it finds, and what may end it."""

    label: str
    folder: Path
    checkpoint: Checkpoint | None
    before: Spent  # by earlier starts
    started: float  # of time.monotonic()
    stop: StopRequest
    fence: Fence
    watchdog: Watchdog


@dataclass(frozen=True)
class Fitted:
    parameters: Mapping[str, Tensor]  # all trained ones in full; none on any rank but the first
    anomalies: list[str]
    spent: Spent


def fit(stage: Stage, trainer: LightningTrainer, choices: Choices, start: Start) -> Fitted:
    """Raises what `train` does, and TooLargeError before the first step."""
    machine, checkpoint, is_first = stage.config.trainer, start.checkpoint, trainer.is_global_zero
    first_step = checkpoint.step if checkpoint is not None else 0
    plan = stage.plan(choices.machine.world_size, choices.micro_batches)
    trainer.accumulate_grad_batches = choices.micro_batches
    apply_choices(stage.mllm, choices)
    module = StageModule(
        stage.mllm.train(),
        stage.recipe,
        num_steps=plan.num_steps,
        first_step=first_step,
        sharding=sharding_of(trainer),
        samples=stage.data.samples,
        stop=start.stop,
        skipped=checkpoint.facts["skipped"] if checkpoint is not None else (),
        nonfinite_root=start.folder / NONFINITE if is_first else None,
    )
    if checkpoint is not None:
        say(f"{start.label}: continuing after {first_step} of {plan.num_steps} optimizer steps.")
    dataset = stage.dataset(plan, trainer.global_rank)
    expense = Expense(
        flops=lambda step: int(stage.flops[plan.global_batch(step)].sum()),
        peak_tflops=device_peak(trainer.strategy.root_device),
        num_gpus=trainer.world_size if choices.machine.device == "cuda" else 0,
        before=start.before,
        started=start.started,
    )
    validation = None
    if len(stage.validation):
        held_out = stage.validation_plan(trainer.world_size, choices.micro_batch_tokens)
        held_out_batches = stage.dataset(held_out, trainer.global_rank)
        validation = Validation(held_out_batches, plan.num_steps, machine.num_workers, start.watchdog.beat)
    with ExitStack() as stack:
        metrics = progress = None
        if is_first:
            metrics = stack.enter_context(MetricsFile(start.folder / METRICS, first_step))
            progress = stack.enter_context(Progress(start.label, plan.num_steps, first_step))
        saver = Saver(
            start.folder / CHECKPOINTS,
            Pace(machine.checkpoint_every_n_steps, machine.checkpoint_every_n_minutes),
            start.stop,
            metrics,
            choices.facts(),
            start.started - start.before.seconds,
            checkpoint,
            start.fence,
            start.watchdog.beat,
        )
        stack.callback(saver.close)  # before the metrics file, which its thread syncs
        kept = stage.memory(choices.recomputed, Attention[choices.attention])
        dry_step = DryStep(
            start.label, lambda: dataset.micro_batch(*plan.heaviest(kept)), choices.micro_batch_tokens
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # the dry step last, so that a signal that comes meanwhile is kept for the first step
        callbacks += [start.watchdog, Telemetry(expense, validation, metrics, progress), saver, dry_step]
        try:
            with dead_workers_named(), memory_named(choices.micro_batch_tokens):
                trainer.fit(module, train_dataloaders=Loader(dataset, first_step, machine.num_workers))
        except SIGTERMException:  # came while Lightning set itself up, before our handlers were back
            raise Interrupted("SIGTERM asked to stop before an optimizer step.") from None
        if metrics is not None:
            metrics.sync()
    return Fitted(
        {name: value for name, value in module.sharding.gather(module.trained()) if is_first},
        module.nonfinite.anomalies(),
        expense.so_far(module.stats.joules),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
