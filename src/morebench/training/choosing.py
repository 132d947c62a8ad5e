"""Choosing: tokens and recompute from memory, kernels and compiling by measurement on the GPU at hand."""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TypeVar

import torch
from lightning.pytorch import Trainer as LightningTrainer

from morebench.config.schema import Attention, Config, LossKernel, Precision, Strategy, TrainRecipe
from morebench.errors import ConfigError, join_problems
from morebench.models.attention_gpu import attention_problem
from morebench.models.blocks import compile_blocks, recompute_blocks
from morebench.models.flops import head_dim, llm_shape
from morebench.models.loss import loss_kernel_problem
from morebench.models.mllm import MLLM
from morebench.models.room import Room, find_room
from morebench.training.choices import Choices, Machine, threads_for
from morebench.training.probe import Probe
from morebench.training.stage import Stage
from morebench.training.strategy import connect

Kind = TypeVar("Kind", bound=Enum)


def choose(stage: Stage, machine: Machine, trainer: LightningTrainer) -> Choices:
    """The same on all ranks. Raises ConfigError for all kernels of the config that cannot be used."""
    attentions, losses = usable(stage.config, stage.recipe, machine.device)
    if machine.device != "cuda":
        return _choices(stage, machine, stage_room(stage, machine.world_size, None), attentions[0], losses[0])
    connect(trainer)  # for what the first rank measures to become everyone's
    chosen = _measured(stage, machine, trainer, attentions, losses) if trainer.is_global_zero else None
    agreed = trainer.strategy.broadcast(chosen)
    assert agreed is not None
    return agreed


def usable(config: Config, recipe: TrainRecipe, device: str) -> tuple[list[Attention], list[LossKernel]]:
    """What to choose from: what the config names, or all that works for `auto`; the surest first."""
    asked = config.trainer
    shape = llm_shape(config)
    dtype = torch.bfloat16 if recipe.precision is Precision.bf16 else torch.float32
    attention_problems = {
        kind: attention_problem(kind, device, dtype, shape.get("attn_logit_softcapping"), head_dim(shape))
        for kind in (Attention.loop, Attention.flex, Attention.varlen)
    }
    loss_problems = {
        kind: loss_kernel_problem(kind, device, dtype, asked.strategy)
        for kind in (LossKernel.one_pass, LossKernel.torch, LossKernel.liger)
    }
    problems = []
    if problem := attention_problems.get(asked.attention):
        problems.append(f"trainer.attention={asked.attention.name}: {problem}, or auto.")
    if problem := loss_problems.get(asked.loss_kernel):
        problems.append(f"trainer.loss_kernel={asked.loss_kernel.name}: {problem}, or auto.")
    if problems:
        raise ConfigError(join_problems(problems))
    return (
        _open(attention_problems) if asked.attention is Attention.auto else [asked.attention],
        _open(loss_problems) if asked.loss_kernel is LossKernel.auto else [asked.loss_kernel],
    )


def stage_room(
    stage: Stage, world_size: int, free: int | None, attention: Attention = Attention.loop
) -> Room:
    """For the heaviest micro-batch of the stage. `free`: bytes; None for a CPU."""

    def kept(tokens: int) -> Callable[[int], float]:
        plan = stage.plan(world_size, stage.micro_batches(world_size, tokens))
        return lambda recomputed: float(plan.loads(stage.memory(recomputed, attention)).max())

    return find_room(stage.config, stage.recipe, world_size, free, kept)


def apply_choices(mllm: MLLM, choices: Choices) -> None:
    """Before the strategy shards or wraps anything."""
    mllm.attention = Attention[choices.attention]
    mllm.loss_kernel = LossKernel[choices.loss_kernel]
    if choices.compile:
        compile_blocks(mllm.llm)
    recompute_blocks(mllm.llm, choices.recomputed)


def smaller(stage: Stage, choices: Choices) -> Choices:
    """After an out-of-memory of the dry step: half the tokens."""
    room = Room(choices.micro_batch_tokens // 2, choices.recomputed)
    attention, loss_kernel = Attention[choices.attention], LossKernel[choices.loss_kernel]
    return _choices(stage, choices.machine, room, attention, loss_kernel, choices.compile)


def _measured(
    stage: Stage,
    machine: Machine,
    trainer: LightningTrainer,
    attentions: list[Attention],
    losses: list[LossKernel],
) -> Choices:
    device = trainer.strategy.root_device
    free, _ = torch.cuda.mem_get_info(device)
    # the loop stands first, and alone may keep a matrix of scores: it is seldom the fastest
    room = stage_room(stage, machine.world_size, free, attentions[-1])
    plan = stage.plan(machine.world_size, stage.micro_batches(machine.world_size, room.micro_batch_tokens))
    asked = stage.config.trainer.compile
    if stage.config.trainer.strategy is Strategy.zero3:  # its hooks in a block are not in what is measured
        asked = bool(asked)
    compiles = [False, True] if asked is None else [asked]
    if len(attentions) == len(losses) == len(compiles) == 1:  # nothing is open
        return _choices(stage, machine, room, attentions[0], losses[0], compiles[0])
    _, ids = plan.heaviest(stage.memory(room.recomputed, attentions[-1]))
    lengths, supervised = (
        counts[list(ids)].tolist() for counts in (stage.index.lengths, stage.index.supervised)
    )
    probe = Probe(stage.config, stage.recipe, lengths, supervised, device)
    attention = probe.fastest("attention", attentions, probe.attend_by)
    loss_kernel = probe.fastest("loss_kernel", losses, probe.lose_by)
    compiled = probe.fastest("compile", compiles, probe.compile_or_not)
    if attention is Attention.loop and attentions[-1] is not Attention.loop:
        room = stage_room(stage, machine.world_size, free, attention)
    return _choices(stage, machine, room, attention, loss_kernel, compiled)


def _choices(
    stage: Stage,
    machine: Machine,
    room: Room,
    attention: Attention,
    loss_kernel: LossKernel,
    compiled: bool | None = None,
) -> Choices:
    return Choices(
        machine=machine,
        micro_batches=stage.micro_batches(machine.world_size, room.micro_batch_tokens),
        threads=threads_for(stage.config.trainer),
        micro_batch_tokens=room.micro_batch_tokens,
        recomputed=room.recomputed,
        attention=attention.name,
        loss_kernel=loss_kernel.name,
        compile=bool(stage.config.trainer.compile) if compiled is None else compiled,
    )


def _open(problems: Mapping[Kind, str | None]) -> list[Kind]:
    return [kind for kind, problem in problems.items() if problem is None]
