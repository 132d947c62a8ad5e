"""What planning a whole epoch of the study costs, and how evenly its bins are filled.

    python benchmarks/epoch_plan.py                                      # about two minutes
    python benchmarks/epoch_plan.py llm=gemma2_9b vision=clip resolution=s2 trainer.micro_batch_tokens=8192

For both stages, both orders and several numbers of devices, each in a process of its own: the number K of
micro-batches, the plan with its largest micro-batch, peak memory.

balance     mean cost of a step's bins as a share of the dearest one's
idle        share of the devices' time spent waiting where all wait for every micro-batch (sharded strategies)
idle/step   the same where all wait for every optimizer step only (DDP)
padding     what a micro-batch would hold if its samples were padded to the longest; ours hold none
digest      stands for every bin of every step
"""

import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context

import numpy as np

from morebench.config.compose import compose_config
from morebench.config.schema import Config, Order
from morebench.data.index import LengthIndex
from morebench.data.packing import BatchPlan, micro_batches_for
from morebench.models.flops import sample_flops, sizes
from morebench.models.room import CPU_TOKENS

WORLD_SIZES = (1, 8, 16, 32)
COLUMNS = (
    "stage",
    "order",
    "GPUs",
    "K",
    "K s",
    "plan s",
    "all s",
    "MB",
    "balance",
    "idle",
    "idle/step",
    "padding",
)
HEAD = "{:9}{:9}{:>5}{:>4}{:>7}{:>8}{:>7}{:>6}{:>9}{:>7}{:>11}{:>9}  {}"


def main() -> None:
    overrides = sys.argv[1:] or ["llm=phi4", "vision=siglip2"]
    print(" ".join(overrides))
    print(HEAD.format(*COLUMNS, "digest"))
    # a process for each: peak memory never falls again
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for stage in ("pretrain", "finetune"):
            for order in Order:
                for world_size in WORLD_SIZES:
                    print(pool.submit(measure, overrides, stage, order, world_size).result(), flush=True)


def measure(overrides: list[str], stage: str, order: Order, world_size: int) -> str:
    config = compose_config(overrides).config
    recipe = config.stage.pretrain if stage == "pretrain" else config.stage.finetune
    index = pretrain_index(config) if stage == "pretrain" else finetune_index(config)
    counts = [values.astype(np.int64) for values in (index.lengths, index.num_images, index.supervised)]
    costs = sample_flops(sizes(config), *counts, recipe.trainable)
    arguments = {
        "global_batch_size": recipe.global_batch_size,
        "epochs": 1,
        "max_steps": None,
        "seed": 0,
        "order": order,
        "world_size": world_size,
        "costs": costs,
    }
    started = time.perf_counter()
    budget = config.trainer.micro_batch_tokens or CPU_TOKENS
    micro_batches = micro_batches_for(index, micro_batch_tokens=budget, **arguments)
    chosen = time.perf_counter()
    plan = BatchPlan(index, micro_batches=micro_batches, **arguments)
    plan.heaviest(index.lengths)
    planned = time.perf_counter()
    bins = [plan.bins(step) for step in range(plan.num_steps)]
    done = time.perf_counter()
    loads = plan.loads(costs).astype(float).reshape(plan.num_steps, micro_batches, world_size)
    snake = np.where(np.arange(micro_batches)[None, :, None] % 2 == 0, loads, loads[:, :, ::-1])
    longest = sum(len(one) * int(index.lengths[one].max()) for step in bins for one in step if one)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return HEAD.format(
        stage,
        order.name,
        world_size,
        micro_batches,
        f"{chosen - started:.2f}",
        f"{planned - chosen:.2f}",
        f"{done - started:.2f}",
        f"{memory:.0f}",
        f"{plan.balance():.3f}",
        f"{1 - loads.sum() / (world_size * loads.max(axis=2).sum()):.1%}",
        f"{1 - loads.sum() / (world_size * snake.sum(axis=1).max(axis=1).sum()):.1%}",
        f"{1 - counts[0].sum() / longest:.1%}",
        sha256(repr(bins).encode()).hexdigest()[:8],
    )


def pretrain_index(config: Config) -> LengthIndex:
    """558,128 captions."""
    generator = np.random.default_rng(0)
    captions = (4 + 11 * generator.lognormal(0, 0.4, 558_128)).astype(np.int32)
    lengths = captions + sizes(config).num_visual_tokens
    return LengthIndex(lengths, captions, np.ones_like(lengths), 0, 0)


def finetune_index(config: Config) -> LengthIndex:
    """665,298 samples, 624,610 of them with an image; some of the others are cut at max_length."""
    generator = np.random.default_rng(1)
    has_image = generator.permutation(np.arange(665_298) < 624_610)
    text = np.where(has_image, 160 * generator.lognormal(0, 0.6, len(has_image)), 0)
    text = np.where(has_image, text, 1_100 * generator.lognormal(0, 0.8, len(has_image))).astype(np.int32)
    lengths = 20 + text + has_image * sizes(config).num_visual_tokens
    lengths = np.minimum(lengths, config.stage.finetune.max_length).astype(np.int32)
    share = np.where(has_image, generator.beta(2, 3, len(has_image)), generator.beta(8, 2, len(has_image)))
    return LengthIndex(lengths, (share * text).astype(np.int32), has_image.astype(np.int32), 0, 0)


if __name__ == "__main__":
    main()
