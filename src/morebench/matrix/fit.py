"""Whether a train step fits into the memory of a GPU, with how much recompute, and what would fit."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from morebench.config.schema import Config, Part, Strategy, TrainRecipe
from morebench.matrix.lengths import Reading
from morebench.matrix.machine import Machine
from morebench.models.flops import llm_shape, sizes
from morebench.models.memory import memory, state_per_rank

_MOST_GPUS = 64  # that are proposed


@dataclass(frozen=True)
class Fit:
    memory: float  # bytes on one rank
    recomputed: float  # share of the LLM's blocks that are computed twice
    fits: bool


def fit(config: Config, recipe: TrainRecipe, read: Reading, machine: Machine) -> Fit:
    """With as little recompute as memory demands, unless trainer.recompute says how much.

    A micro-batch holds `trainer.micro_batch_tokens`, or as many as there is room for: at least the longest
    sample.
    """
    state = state_per_rank(config, recipe.trainable, config.trainer.strategy, machine.num_gpus)
    blocks = llm_shape(config)["num_hidden_layers"]
    room = inf if machine.memory is None else machine.memory

    def needed(recomputed: int) -> float:
        return state + _micro_batch(config, recipe, read, recomputed)

    recomputed = 0
    # a frozen linear layer keeps nothing that could be computed again
    if Part.llm in recipe.trainable and config.trainer.recompute is not None:
        recomputed = round(config.trainer.recompute * blocks)
    elif Part.llm in recipe.trainable and needed(0) > room:
        more = bisect_left(range(1, blocks), True, key=lambda number: needed(number) <= room)
        recomputed = 1 + more
    return Fit(needed(recomputed), recomputed / blocks, needed(recomputed) <= room)


def proposal(config: Config, recipe: TrainRecipe, read: Reading, machine: Machine) -> str:
    """For a step that does not fit: the least change that helps."""
    assert machine.gpu is not None
    short = f"more than the {machine.gpu.memory_gib:g} GiB of {machine.gpu.label}"
    if config.trainer.micro_batch_tokens is not None:
        config = _with(config, micro_batch_tokens=None)
        if fit(config, recipe, read, machine).fits:
            return f"{short}; a smaller trainer.micro_batch_tokens fits (null: as memory allows)"
    config = _with(config, strategy=Strategy.fsdp2, recompute=None)
    num_gpus = max(2, machine.num_gpus)
    while num_gpus <= _MOST_GPUS:
        if fit(config, recipe, read, replace(machine, num_gpus=num_gpus)).fits:
            return f"{short}; {num_gpus} GPUs with trainer.strategy=fsdp2 fit it"
        num_gpus *= 2
    return f"{short}; not even {_MOST_GPUS} of them fit it: choose GPUs with more memory"


def _with(config: Config, **changes: Any) -> Config:
    return replace(config, trainer=replace(config.trainer, **changes))


def _micro_batch(config: Config, recipe: TrainRecipe, read: Reading, recomputed: int) -> float:
    """Bytes that the backward pass waits for."""
    visual = sizes(config).num_visual_tokens
    supervised = read.supervised / max(1.0, read.tokens - read.images * visual)  # of a text

    def kept(length: float, images: float) -> float:
        text = max(0.0, length - images * visual)
        return memory(
            config, length, images, text * supervised, recipe.trainable, recomputed, config.trainer.attention
        ).sample

    longest = kept(read.longest, round(read.images / read.samples))
    if config.trainer.micro_batch_tokens is None:
        return longest
    usual = read.tokens / read.samples
    batch = kept(usual, read.images / read.samples) * config.trainer.micro_batch_tokens / usual
    return max(longest, batch)
