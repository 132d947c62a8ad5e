"""Whether a train step fits into the memory of a GPU, with how much recompute, and what would fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from morebench.config.schema import Config, Strategy, TrainRecipe
from morebench.matrix.lengths import Reading
from morebench.matrix.machine import Machine
from morebench.models.flops import llm_shape, sizes
from morebench.models.memory import image_bytes, memory, state_per_rank
from morebench.models.room import SHARE, find_room

_MOST_GPUS = 64  # that are proposed


@dataclass(frozen=True)
class Fit:
    memory: float  # bytes on one rank
    recomputed: float  # share of the LLM's blocks that are computed twice
    fits: bool


def fit(config: Config, recipe: TrainRecipe, read: Reading, machine: Machine) -> Fit:
    """With the micro-batch and the recompute that the train engine would choose on such a GPU."""
    assert machine.memory is not None

    def kept(tokens: int) -> Callable[[int], float]:
        return lambda recomputed: _micro_batch(config, recipe, read, machine.num_gpus, tokens, recomputed)

    room = find_room(config, recipe, machine.num_gpus, machine.memory, kept)
    state = state_per_rank(config, recipe.trainable, config.trainer.strategy, machine.num_gpus)
    needed = state + kept(room.micro_batch_tokens)(room.recomputed)
    blocks = llm_shape(config)["num_hidden_layers"]
    return Fit(needed, room.recomputed / blocks, needed <= SHARE * machine.memory)


def proposal(config: Config, recipe: TrainRecipe, read: Reading, machine: Machine) -> str:
    """For a step that does not fit: the least change that helps."""
    assert machine.gpu is not None
    short = f"more than {SHARE:.0%} of the {machine.gpu.memory_gib:g} GiB of {machine.gpu.label}"
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


def _micro_batch(
    config: Config, recipe: TrainRecipe, read: Reading, num_gpus: int, tokens: int, recomputed: int
) -> float:
    """Bytes that the backward pass waits for: of usual samples, or of the longest one alone."""
    visual = sizes(config).num_visual_tokens
    supervised = read.supervised / max(1.0, read.tokens - read.images * visual)  # of a text

    def kept(length: float, images: float) -> float:
        text = max(0.0, length - images * visual)
        sample = memory(
            config, length, images, text * supervised, recipe.trainable, recomputed, config.trainer.attention
        ).sample
        return sample + images * image_bytes(config)

    usual, images = read.tokens / read.samples, read.images / read.samples
    # a rank has no more than its part of a global batch
    number = min(tokens / usual, recipe.global_batch_size / num_gpus)
    return max(kept(read.longest, round(images)), number * kept(usual, images))
