"""Train one step of one cell; started again after any kind of death, it goes on where it can."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from morebench.config.compose import ROOT
from morebench.config.schema import Config, Step
from morebench.data.datamodule import Loader, dead_workers_named
from morebench.errors import Interrupted
from morebench.models.parts import save_parts
from morebench.progress import Progress
from morebench.training.choices import Choices, this_machine, threads_for
from morebench.training.dry_step import DryStep, memory_named
from morebench.training.fence import Fence, unfenced
from morebench.training.files import (
    disk_full_named,
    read_manifest,
    remove_folder,
    sha256,
    sync,
    update_manifest,
)
from morebench.training.module import StageModule
from morebench.training.provenance import provenance
from morebench.training.resume import Checkpoint, newest_checkpoint
from morebench.training.saving import Pace, Saver
from morebench.training.signals import StopRequest
from morebench.training.spent import Spent, read_lines, spent_before, totals
from morebench.training.stage import Stage, make_stage, recipe_of
from morebench.training.strategy import exact_arithmetic, make_trainer, quiet_libraries, sharding_of
from morebench.training.telemetry import Expense, MetricsFile, Telemetry, device_peak
from morebench.training.validation import Validation
from morebench.training.watchdog import Watchdog

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
NONFINITE = "nonfinite"


def train(
    config: Config, step: Step, folder: Path, parents: Mapping[Step, Path], fence: Fence = unfenced
) -> None:
    """Write metrics.jsonl and one safetensors file per trained part into `folder`; complete manifest.json.

    A whole result is left alone. Raises Interrupted, NonFiniteError, DiskFullError, DataError, WeightsError,
    RunError, and what `fence` does.
    """
    if _is_trained(folder):
        remove_folder(folder / CHECKPOINTS)
        return
    started = time.monotonic()
    recipe, _ = recipe_of(config, step)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(quiet_libraries())
        trainer = make_trainer(config.trainer, recipe)
        watchdog = Watchdog(config.trainer.hang_timeout_minutes, trainer.global_rank)
        stack.enter_context(watchdog)
        checkpoint = newest_checkpoint(folder / CHECKPOINTS, _say)
        torch.manual_seed(config.seed)
        planned = read_manifest(folder).get("planned_data")
        stage = make_stage(config, step, parents, trainer.is_global_zero, planned)
        choices, same = _choose(stage, trainer, checkpoint)
        stack.enter_context(exact_arithmetic(choices.threads))
        before = Spent()
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            before = spent_before(folder, folder / METRICS)
            _begin_manifest(folder, stage, choices, checkpoint, same, before)
        if stop.signal_name is not None:
            raise Interrupted(f"{stop.signal_name} asked to stop before the first optimizer step.")
        module, spent = _fit(
            stage, trainer, choices, checkpoint, stop, step.name, folder, before, started, fence, watchdog
        )
        parameters = {
            name: value for name, value in module.sharding.gather(module.trained()) if trainer.is_global_zero
        }
    if trainer.is_global_zero:
        _finish(stage, parameters, module.nonfinite.anomalies(), folder, spent, fence)


def _choose(stage: Stage, trainer: LightningTrainer, checkpoint: Checkpoint | None) -> tuple[Choices, bool]:
    """The choices, and whether they are those the checkpoint was made with."""
    config = stage.config
    machine = this_machine(config, trainer.strategy.root_device.type, trainer.world_size)
    kept = Choices.from_facts(checkpoint.facts["choices"]) if checkpoint is not None else None
    if kept is not None and kept.machine == machine:
        return kept, True
    micro_batches = stage.micro_batches(machine.world_size, machine.micro_batch_tokens)
    chosen = Choices(machine, micro_batches, threads_for(config.trainer))
    if kept is None:
        return chosen, True
    _say(f"This run began on {kept.machine} and goes on on {machine}: not bit-exact from here on.")
    return chosen, False


def _begin_manifest(
    folder: Path, stage: Stage, choices: Choices, checkpoint: Checkpoint | None, same: bool, before: Spent
) -> None:
    anomalies = read_manifest(folder).get("anomalies", []) if checkpoint is not None else []
    if checkpoint is not None and not same:
        anomalies.append(f"went on after {checkpoint.step} optimizer steps on another machine: not bit-exact")
    plan = stage.plan(choices.machine.world_size, choices.micro_batches)
    if plan.idle_share:
        _say(
            f"A global batch of {stage.recipe.global_batch_size} has fewer samples than there are bins: "
            f"{plan.idle_share:.0%} of the micro-batches are empty. Fewer devices would be as fast."
        )
    facts = {
        "num_steps": plan.num_steps,
        "micro_batches": choices.micro_batches,
        "balance": round(plan.balance(), 4),
        "threads": choices.threads,
        "world_size": choices.machine.world_size,
        "seed": stage.config.seed,
        "anomalies": anomalies,
        "planned_flops": sum(plan.loads(stage.flops).sum(axis=1).tolist()),  # more than an int64 holds
    }
    if before.seconds:  # lines of metrics.jsonl that say so are about to be cut
        facts |= asdict(before)
    update_manifest(folder, facts | stage.facts() | provenance(ROOT))


def _fit(
    stage: Stage,
    trainer: LightningTrainer,
    choices: Choices,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
    label: str,
    folder: Path,
    before: Spent,
    started: float,
    fence: Fence,
    watchdog: Watchdog,
) -> tuple[StageModule, Spent]:
    config, first_step = stage.config, checkpoint.step if checkpoint is not None else 0
    plan = stage.plan(choices.machine.world_size, choices.micro_batches)
    trainer.accumulate_grad_batches = choices.micro_batches
    module = StageModule(
        stage.mllm.train(),
        stage.recipe,
        num_steps=plan.num_steps,
        first_step=first_step,
        sharding=sharding_of(trainer),
        samples=stage.data.samples,
        stop=stop,
        skipped=checkpoint.facts["skipped"] if checkpoint is not None else (),
        nonfinite_root=folder / NONFINITE if trainer.is_global_zero else None,
    )
    if checkpoint is not None:
        _say(f"{label}: continuing after {first_step} of {plan.num_steps} optimizer steps.")
    dataset = stage.dataset(plan, trainer.global_rank)
    batches = Loader(dataset, first_step, config.trainer.num_workers)
    expense = Expense(
        flops=lambda step: int(stage.flops[plan.global_batch(step)].sum()),
        peak_tflops=device_peak(trainer.strategy.root_device),
        num_gpus=trainer.world_size if choices.machine.device == "cuda" else 0,
        before=before,
        started=started,
    )
    validation = None
    if len(stage.validation):
        held_out = stage.validation_plan(trainer.world_size, choices.machine.micro_batch_tokens)
        validation_batches = stage.dataset(held_out, trainer.global_rank)
        validation = Validation(validation_batches, plan.num_steps, config.trainer.num_workers)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(watchdog)
    with ExitStack() as stack:
        metrics = progress = None
        if trainer.is_global_zero:
            metrics = stack.enter_context(MetricsFile(folder / METRICS, first_step))
            progress = stack.enter_context(Progress(label, plan.num_steps, first_step))
        callbacks.append(Telemetry(expense, validation, metrics, progress))
        saver = Saver(
            folder / CHECKPOINTS,
            Pace(config.trainer.checkpoint_every_n_steps, config.trainer.checkpoint_every_n_minutes),
            stop,
            metrics,
            choices.facts(),
            started - before.seconds,
            checkpoint,
            fence,
            watchdog.beat,
        )
        stack.callback(saver.close)  # before the metrics file, which its thread syncs
        callbacks.append(saver)
        # the last, so that a signal that comes meanwhile is kept for the first step
        callbacks.append(
            DryStep(
                label,
                lambda: dataset.micro_batch(*plan.heaviest(stage.memory())),
                choices.machine.micro_batch_tokens,
            )
        )
        try:
            with dead_workers_named(), memory_named(choices.machine.micro_batch_tokens):
                trainer.fit(module, train_dataloaders=batches)
        except SIGTERMException:  # came while Lightning set itself up, before our handlers were back
            raise Interrupted("SIGTERM asked to stop before an optimizer step.") from None
        if metrics is not None:
            metrics.sync()
    return module, expense.so_far(module.stats.joules)


def _finish(
    stage: Stage,
    parameters: Mapping[str, Tensor],
    anomalies: list[str],
    folder: Path,
    spent: Spent,
    fence: Fence,
) -> None:
    """Parts, then their hashes in the manifest, then the checkpoints go: a kill in between loses nothing."""
    for leftover in folder.glob("*.safetensors.tmp-*"):
        leftover.unlink()
    fence()
    with disk_full_named(folder):
        written = save_parts(stage.mllm, stage.recipe.trainable, folder, parameters)
        sync(folder)
    fence()
    update_manifest(
        folder,
        {
            "anomalies": read_manifest(folder)["anomalies"] + anomalies,
            **asdict(spent),
            "training": totals(read_lines(folder / METRICS)),
            "parts": {path.name: sha256(path) for path in written},
        },
    )
    remove_folder(folder / CHECKPOINTS)


def _is_trained(folder: Path) -> bool:
    """The manifest lists the parts only once they are on the disk."""
    parts: dict[str, str] = read_manifest(folder).get("parts", {})
    return bool(parts) and all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in parts.items()
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
