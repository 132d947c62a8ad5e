"""Train one step of one cell; started again after any kind of death, it goes on where it can."""

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Trainer as LightningTrainer

from morebench.config.compose import ROOT
from morebench.config.schema import Config, Step
from morebench.errors import Interrupted, RunError
from morebench.models.attention_gpu import forget_compiled
from morebench.models.parts import save_parts
from morebench.training.choices import Choices, this_machine
from morebench.training.choosing import choose, smaller
from morebench.training.dry_step import TooLargeError
from morebench.training.fence import Fence, unfenced
from morebench.training.files import (
    disk_full_named,
    read_manifest,
    remove_folder,
    sha256,
    sync,
    update_manifest,
)
from morebench.training.fit import CHECKPOINTS, METRICS, Fitted, Start, fit, say
from morebench.training.provenance import provenance
from morebench.training.resume import Checkpoint, newest_checkpoint
from morebench.training.signals import StopRequest
from morebench.training.spent import Spent, read_lines, spent_before, totals
from morebench.training.stage import Stage, make_stage, recipe_of
from morebench.training.strategy import (
    connect,
    exact_arithmetic,
    make_trainer,
    matmul_precision,
    quiet_libraries,
)
from morebench.training.watchdog import Watchdog


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
    forget_compiled()
    recipe, _ = recipe_of(config, step)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(quiet_libraries())
        stack.enter_context(matmul_precision(recipe.precision))
        trainer = make_trainer(config.trainer, recipe)
        is_first = trainer.is_global_zero
        watchdog = stack.enter_context(Watchdog(config.trainer.hang_timeout_minutes, trainer.global_rank))
        unusable: list[str] = []
        checkpoint = newest_checkpoint(folder / CHECKPOINTS, unusable.append)
        for text in unusable:
            say(text)
        _check_same_start(trainer, checkpoint, folder / CHECKPOINTS)
        before = spent_before(folder, folder / METRICS) if is_first else Spent()
        planned = read_manifest(folder).get("planned_data")

        def seeded_stage() -> Stage:
            torch.manual_seed(config.seed)
            return make_stage(config, step, parents, is_first, planned)

        stage = seeded_stage()
        choices, same = _choose(stage, trainer, checkpoint)
        stack.enter_context(exact_arithmetic(choices.threads))
        while True:
            if is_first:
                folder.mkdir(parents=True, exist_ok=True)
                _begin_manifest(folder, stage, choices, checkpoint, same, before, len(unusable))
            if stop.signal_name is not None:
                raise Interrupted(f"{stop.signal_name} asked to stop before the first optimizer step.")
            start = Start(step.name, folder, checkpoint, before, started, stop, fence, watchdog)
            try:
                fitted = fit(stage, trainer, choices, start)
                break
            except TooLargeError as error:
                if config.trainer.micro_batch_tokens is not None or error.num_samples == 1:
                    raise
                say(f"{error} It came from an estimate: trying half.")
            # out here, because the error holds on to what filled the memory
            choices, same = smaller(stage, choices), checkpoint is None
            del stage
            trainer = make_trainer(config.trainer, recipe)
            _release_memory()
            stage = seeded_stage()
    if is_first:
        _finish(stage, fitted, folder, fence)


def _check_same_start(trainer: LightningTrainer, checkpoint: Checkpoint | None, root: Path) -> None:
    """Raises RunError on all ranks where they found different checkpoints. Before anything follows from a
    checkpoint: a rank that chooses while another one keeps its choices would wait for it in vain.
    """
    if trainer.world_size == 1:
        return
    connect(trainer)
    found: list[int] = [0] * trainer.world_size
    torch.distributed.all_gather_object(found, checkpoint.step if checkpoint is not None else 0)
    others = {rank: step for rank, step in enumerate(found) if step != found[0]}
    if others:
        rank, step = next(iter(others.items()))
        raise RunError(
            f"Rank {rank} found a whole checkpoint of {step} optimizer steps, rank 0 one of {found[0]}. "
            f"All nodes of a run must see the same files in {root}."
        )


def _choose(stage: Stage, trainer: LightningTrainer, checkpoint: Checkpoint | None) -> tuple[Choices, bool]:
    """The choices, and whether they are those the checkpoint was made with."""
    config = stage.config
    machine = this_machine(config, trainer.strategy.root_device, trainer.world_size)
    kept = Choices.from_facts(checkpoint.facts["choices"]) if checkpoint is not None else None
    if kept is not None and kept.machine == machine:
        return kept, True
    chosen = choose(stage, machine, trainer)
    if kept is None:
        return chosen, True
    say(f"This run began on {kept.machine} and goes on on {machine}: not bit-exact from here on.")
    return chosen, False


def _begin_manifest(
    folder: Path,
    stage: Stage,
    choices: Choices,
    checkpoint: Checkpoint | None,
    same: bool,
    before: Spent,
    num_unusable: int,
) -> None:
    anomalies = read_manifest(folder).get("anomalies", []) if checkpoint is not None else []
    text = None
    if checkpoint is not None and not same:
        text = f"went on after {checkpoint.step} optimizer steps on another machine: not bit-exact"
    elif checkpoint is None and num_unusable:
        text = f"began again from the first step: none of {num_unusable} checkpoints was usable"
        say(f"{text[0].upper()}{text[1:]}.")
    if text is not None and text not in anomalies:
        anomalies.append(text)
    plan = stage.plan(choices.machine.world_size, choices.micro_batches)
    if plan.idle_share:
        say(
            f"A global batch of {stage.recipe.global_batch_size} has fewer samples than there are bins: "
            f"{plan.idle_share:.0%} of the micro-batches are empty. Fewer devices would be as fast."
        )
    facts = {
        "num_steps": plan.num_steps,
        "micro_batches": choices.micro_batches,
        "balance": round(plan.balance(), 4),
        "threads": choices.threads,
        "micro_batch_tokens": choices.micro_batch_tokens,
        "recomputed_blocks": choices.recomputed,
        "attention": choices.attention,
        "loss_kernel": choices.loss_kernel,
        "compile": choices.compile,
        "world_size": choices.machine.world_size,
        "seed": stage.config.seed,
        "anomalies": anomalies,
        "planned_flops": sum(plan.loads(stage.flops).sum(axis=1).tolist()),  # more than an int64 holds
    }
    if before.seconds:  # lines of metrics.jsonl that say so are about to be cut
        facts |= asdict(before)
    update_manifest(folder, facts | stage.facts() | provenance(ROOT))


def _finish(stage: Stage, fitted: Fitted, folder: Path, fence: Fence) -> None:
    """Parts, then their hashes in the manifest, then the checkpoints go: a kill in between loses nothing."""
    for leftover in folder.glob("*.safetensors.tmp-*"):
        leftover.unlink()
    fence()
    with disk_full_named(folder):
        written = save_parts(stage.mllm, stage.recipe.trainable, folder, fitted.parameters)
        sync(folder)
    fence()
    update_manifest(
        folder,
        {
            "anomalies": read_manifest(folder)["anomalies"] + fitted.anomalies,
            **asdict(fitted.spent),
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


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
