"""Which samples an optimizer step sees, and how they are dealt to ranks and micro-batches.

Everything is a pure function of (seed, step). The global batch depends on nothing else; the number of ranks
and micro-batches only decides into how many bins it is dealt.
"""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np

from morebench.config.schema import Order
from morebench.data.index import LengthIndex


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [N]; a uniform permutation of the sample numbers."""
    return _permutation(num_samples, (seed, epoch))


def modality_order(has_image: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [N]; each full batch is all-image or all-text, but for at most one that takes the leftovers.

    The study's grouping, as a pure function of (seed, epoch). A batch that is not full comes last.
    """
    order = epoch_order(len(has_image), seed, epoch)
    with_image, text_only = order[has_image[order]], order[~has_image[order]]
    pure = [len(group) // batch_size * batch_size for group in (with_image, text_only)]
    grouped = np.concatenate(
        [with_image[: pure[0]], text_only[: pure[1]], with_image[pure[0] :], text_only[pure[1] :]]
    )
    num_full = len(grouped) // batch_size
    full = grouped[: num_full * batch_size].reshape(num_full, batch_size)
    shuffled = full[_permutation(num_full, (seed, epoch, 1))]
    return np.concatenate([shuffled.reshape(-1), grouped[num_full * batch_size :]])


def num_optimizer_steps(num_samples: int, global_batch_size: int, epochs: int, max_steps: int | None) -> int:
    steps = epochs * -(-num_samples // global_batch_size)
    return steps if max_steps is None else min(steps, max_steps)


class BatchPlan:
    def __init__(
        self,
        index: LengthIndex,
        *,
        global_batch_size: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        order: Order,
        world_size: int,
        micro_batches: int,
        costs: np.ndarray | None = None,
    ) -> None:
        """`costs` [N] is what ranks are balanced by, e.g. FLOPs; without it, the number of tokens."""
        self.index = index
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.num_steps = num_optimizer_steps(len(index.lengths), global_batch_size, epochs, max_steps)
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._order = order
        self._costs = (index.lengths if costs is None else costs).astype(np.float64)
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def idle_share(self) -> float:
        """Share of the bins of a full global batch that stay empty, because there are more than samples."""
        samples = min(self._global_batch_size, len(self.index.lengths))
        return max(0.0, 1 - samples / (self.world_size * self.micro_batches))

    def global_batch(self, step: int) -> np.ndarray:
        """int64 sample numbers; the last batch of an epoch may be smaller."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"optimizer step {step} of {self.num_steps}")
        epoch, batch = divmod(step, -(-len(self.index.lengths) // self._global_batch_size))
        start = batch * self._global_batch_size
        return self._order_of(epoch)[start : start + self._global_batch_size]

    def bins(self, step: int) -> list[list[int]]:
        """The global batch in world_size x micro_batches bins of nearly equal cost; some may be empty.

        `bins[k * world_size : (k + 1) * world_size]` run at the same time.
        """
        ids = self.global_batch(step)
        dealt = deal(self._costs[ids], self.world_size * self.micro_batches)
        return [[int(ids[member]) for member in members] for members in dealt]

    def bin(self, step: int, rank: int, k: int) -> list[int]:
        place = rank if k % 2 == 0 else self.world_size - 1 - rank  # dear bins go to each rank in turn
        return self.bins(step)[k * self.world_size + place]

    def supervised_tokens(self, step: int) -> int:
        """Of the whole global batch: the denominator of its loss."""
        return int(self.index.supervised[self.global_batch(step)].sum())

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            size, seed = len(self.index.lengths), self._seed
            self._epochs[epoch] = (
                modality_order(self.index.num_images > 0, self._global_batch_size, seed, epoch)
                if self._order is Order.modality
                else epoch_order(size, seed, epoch)
            )
        return self._epochs[epoch]


def deal(costs: np.ndarray, num_bins: int) -> list[list[int]]:
    """Positions in `costs`, longest processing time first; dear bins first, so that neighbours cost alike."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0.0, number) for number in range(num_bins)]
    heapify(loads)
    for member in np.argsort(-costs, kind="stable").tolist():
        load, number = loads[0]
        bins[number].append(member)
        heapreplace(loads, (load + float(costs[member]), number))
    load_of = {number: load for load, number in loads}
    ranked = sorted(range(num_bins), key=lambda number: (-load_of[number], not bins[number], number))
    return [sorted(bins[number]) for number in ranked]


def micro_batches_for(
    index: LengthIndex,
    *,
    global_batch_size: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
    order: Order,
    world_size: int,
    micro_batch_tokens: int,
    costs: np.ndarray | None = None,
) -> int:
    """The smallest number of micro-batches per rank that keeps every bin of the stage within the budget.

    One number for the whole stage. A sample longer than `micro_batch_tokens` is allowed in a bin of its own.
    """

    def plan(micro_batches: int) -> BatchPlan:
        return BatchPlan(
            index,
            global_batch_size=global_batch_size,
            epochs=epochs,
            max_steps=max_steps,
            seed=seed,
            order=order,
            world_size=world_size,
            micro_batches=micro_batches,
            costs=costs,
        )

    batches = plan(1)
    capped = np.minimum(index.lengths, micro_batch_tokens)  # a longer sample fills one bin, not several
    tokens = [int(capped[batches.global_batch(step)].sum()) for step in range(batches.num_steps)]
    hardest_first = sorted(range(batches.num_steps), key=lambda step: -tokens[step])
    micro_batches = max(1, -(-max(tokens) // (world_size * micro_batch_tokens)))
    while not all(
        _within(plan_bins, index.lengths, micro_batch_tokens)
        for plan_bins in map(plan(micro_batches).bins, hardest_first)
    ):
        micro_batches += 1
    return micro_batches


def _within(bins: Sequence[Sequence[int]], lengths: np.ndarray, budget: int) -> bool:
    return all(len(members) <= 1 or int(lengths[members].sum()) <= budget for members in bins)


def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    """From the raw bits of a generator of its own: NumPy keeps those the same in every version."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
