"""How many tokens a micro-batch has, and how many blocks are computed twice, for a step to fit: no torch."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from morebench.config.schema import Config, Part, TrainRecipe
from morebench.models.flops import llm_shape
from morebench.models.memory import state_per_rank

# Of the device's free memory. The rest is what no estimate counts: gradients of activations on their way,
# logits of one chunk, workspaces of cuBLAS and NCCL, gaps in the allocator. The dry step has the last word.
SHARE = 0.85
# Above, matrix products do not get faster, and 65,536 tokens x 28,672 (gate and up of Gemma-2-9B) is close
# below the 2^31 elements that kernels index with 32 bits.
MOST_TOKENS = 65_536
# Below, a GPU waits for its weights: rather compute some blocks twice than take less at once.
BUSY_TOKENS = 8_192
_LEAST_TOKENS = 512
# Without a device memory to fill. Larger micro-batches are no faster on a CPU.
CPU_TOKENS = 16_384

# tokens of a micro-batch -> recomputed blocks -> bytes that the backward pass waits for
Kept = Callable[[int], Callable[[int], float]]


@dataclass(frozen=True)
class Room:
    micro_batch_tokens: int
    recomputed: int  # blocks of the LLM


def find_room(config: Config, recipe: TrainRecipe, world_size: int, free: float | None, kept: Kept) -> Room:
    """`free`: bytes of a device that holds nothing yet; None for a CPU, where all fits.

    As many tokens as fit, down to `BUSY_TOKENS`; then as few recomputed blocks as fit; then fewer tokens.
    What the config says is kept. If nothing fits, the smallest, for the dry step to judge.
    """
    trainer, blocks = config.trainer, llm_shape(config)["num_hidden_layers"]
    llm_trained = Part.llm in recipe.trainable  # a frozen one keeps little: nothing is recomputed
    asked = None if trainer.recompute is None else round(trainer.recompute * blocks) * llm_trained
    if free is None:
        return Room(trainer.micro_batch_tokens or CPU_TOKENS, asked or 0)
    room = SHARE * free - state_per_rank(config, recipe.trainable, trainer.strategy, world_size)
    most = blocks if llm_trained else 0
    if trainer.micro_batch_tokens is not None:
        sizes = [trainer.micro_batch_tokens]
    else:
        sizes = [MOST_TOKENS]
        while sizes[-1] > _LEAST_TOKENS:
            sizes.append(sizes[-1] // 2)
    for tokens in sizes:
        needed = kept(tokens)
        if needed(asked or 0) <= room:
            return Room(tokens, asked or 0)
        may_recompute = asked is None and (tokens <= BUSY_TOKENS or len(sizes) == 1)
        if may_recompute and needed(most) <= room:
            # one block more always keeps less, and `most` fits
            fewer = bisect_left(range(1, most), True, key=lambda number: needed(number) <= room)
            return Room(tokens, 1 + fewer)
    return Room(sizes[-1], most if asked is None else asked)
