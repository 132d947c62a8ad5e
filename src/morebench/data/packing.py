"""Which samples an optimizer step sees, and how they are dealt to ranks and micro-batches.

Everything is a pure function of (seed, step). The global batch depends on nothing else; the number of ranks
and micro-batches only decides into how many bins it is dealt.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Epoch:
    """Its global batches and how they are dealt; the last batch may be smaller than the others."""

    order: np.ndarray  # int64 [N]; sample numbers
    bins: np.ndarray  # int32 [N]; the bin of the sample at that place of `order`
    batch_size: int

    def batch(self, number: int) -> slice:
        return slice(number * self.batch_size, (number + 1) * self.batch_size)

    def loads(self, weights: np.ndarray, num_bins: int) -> np.ndarray:
        """int64 [batches, num_bins]: the sum of `weights` [N] of the samples in every bin."""
        num_batches = -(-len(self.order) // self.batch_size)
        loads = np.zeros(num_batches * num_bins, np.int64)
        batches = np.arange(len(self.order)) // self.batch_size
        np.add.at(loads, batches * num_bins + self.bins, weights[self.order])
        return loads.reshape(num_batches, num_bins)


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
        samples: np.ndarray | None = None,
    ) -> None:
        """`costs` [N] is what bins are balanced by, e.g. FLOPs; without it, the number of tokens.

        They are whole numbers: sums of them are the same on every machine. `samples` are the numbers of those
        that are planned; without it, all N.
        """
        self.index = index
        self.world_size = world_size
        self.micro_batches = micro_batches
        self._samples = _all_of(index) if samples is None else samples
        self.num_steps = num_optimizer_steps(len(self._samples), global_batch_size, epochs, max_steps)
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._order = order
        self._costs = index.lengths if costs is None else costs
        assert np.issubdtype(self._costs.dtype, np.integer)
        self._epochs: dict[int, _Epoch] = {}

    @property
    def idle_share(self) -> float:
        """Share of the bins of a full global batch that stay empty, because there are more than samples."""
        samples = min(self._global_batch_size, len(self._samples))
        return max(0.0, 1 - samples / self._num_bins)

    def global_batch(self, step: int) -> np.ndarray:
        """int64 sample numbers; the last batch of an epoch may be smaller."""
        epoch, batch = self._find(step)
        return epoch.order[epoch.batch(batch)]

    def bins(self, step: int) -> list[list[int]]:
        """The global batch in world_size x micro_batches bins of nearly equal cost; some may be empty.

        `bins[k * world_size : (k + 1) * world_size]` run at the same time.
        """
        epoch, batch = self._find(step)
        members: list[list[int]] = [[] for _ in range(self._num_bins)]
        place = epoch.batch(batch)
        for number, sample in zip(epoch.bins[place].tolist(), epoch.order[place].tolist(), strict=True):
            members[number].append(sample)
        return members

    def bin(self, step: int, rank: int, k: int) -> list[int]:
        place = rank if k % 2 == 0 else self.world_size - 1 - rank  # dear bins go to each rank in turn
        return self.bins(step)[k * self.world_size + place]

    def supervised_tokens(self, step: int) -> int:
        """Of the whole global batch: the denominator of its loss."""
        return int(self.index.supervised[self.global_batch(step)].sum())

    def loads(self, weights: np.ndarray) -> np.ndarray:
        """int64 [num_steps, bins]: the sum of `weights` [N], one per sample, over every bin of the stage."""
        epochs = [self._epoch(number) for number in range(-(-self.num_steps // self._steps_per_epoch))]
        found = [epoch.loads(weights, self._num_bins) for epoch in epochs]
        return np.concatenate(found)[: self.num_steps]

    def heaviest(self, weights: np.ndarray) -> tuple[int, list[int]]:
        """Step and samples of the micro-batch, of all of the stage, with the largest sum of `weights` [N]."""
        step, number = divmod(int(self.loads(weights).argmax()), self._num_bins)
        return step, self.bins(step)[number]

    def balance(self) -> float:
        """Mean cost of a step's bins as a share of its dearest one's, averaged over the steps."""
        loads = self.loads(self._costs)
        return float(np.mean(loads.mean(axis=1) / np.maximum(1, loads.max(axis=1))))

    @property
    def _num_bins(self) -> int:
        return self.world_size * self.micro_batches

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._samples) // self._global_batch_size)

    def _find(self, step: int) -> tuple[_Epoch, int]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"optimizer step {step} of {self.num_steps}")
        epoch, batch = divmod(step, self._steps_per_epoch)
        return self._epoch(epoch), batch

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = epoch_batches(
                self.index, self._samples, self._global_batch_size, self._seed, number, self._order
            )
            bins = deal_all(self._costs[order], self._global_batch_size, self._num_bins)
            self._epochs[number] = _Epoch(order, bins, self._global_batch_size)
        return self._epochs[number]


def epoch_batches(
    index: LengthIndex, samples: np.ndarray, batch_size: int, seed: int, epoch: int, order: Order
) -> np.ndarray:
    """int64, like `samples`: they in the order of the epoch, a global batch after the other."""
    if order is Order.modality:
        return samples[modality_order(index.num_images[samples] > 0, batch_size, seed, epoch)]
    return samples[epoch_order(len(samples), seed, epoch)]


def deal_all(costs: np.ndarray, batch_size: int, num_bins: int) -> np.ndarray:
    """int32 [N]: the bins of all samples; every `batch_size` of them are dealt for themselves."""
    full = len(costs) // batch_size * batch_size
    dealt = [deal(costs[:full].reshape(-1, batch_size), num_bins).reshape(-1)] if full else []
    return np.concatenate([*dealt, deal(costs[None, full:], num_bins)[0]])


def deal(costs_SB: np.ndarray, num_bins: int) -> np.ndarray:
    """int32 [S, B]: the bin of each of the B samples of S batches; batches know nothing of each other.

    Longest processing time first: the dearest sample left goes to the bin with the least so far. Dear bins
    come first, so that neighbours cost alike. One loop over the samples deals all batches of an epoch.
    """
    num_batches, batch_size = costs_SB.shape
    batches = np.arange(num_batches)
    bins = np.zeros((num_batches, batch_size), np.int32)
    loads = np.zeros((num_batches, num_bins), np.int64)
    for samples in np.argsort(-costs_SB.astype(np.int64), axis=1, kind="stable").T:
        cheapest = loads.argmin(axis=1)  # the first of several
        bins[batches, samples] = cheapest
        loads[batches, cheapest] += costs_SB[batches, samples]
    dear_first = np.argsort(-loads, axis=1, kind="stable")
    rank = np.zeros_like(dear_first)
    np.put_along_axis(rank, dear_first, np.arange(num_bins)[None], axis=1)
    return np.take_along_axis(rank, bins, axis=1).astype(np.int32)


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
    samples: np.ndarray | None = None,
) -> int:
    """The smallest number of micro-batches per rank that keeps every bin of the stage within the budget.

    One number for the whole stage. A sample longer than `micro_batch_tokens` is allowed in a bin of its own.
    """

    samples = _all_of(index) if samples is None else samples
    steps = num_optimizer_steps(len(samples), global_batch_size, epochs, max_steps)
    per_epoch = -(-len(samples) // global_batch_size)
    orders = [  # without the batches that max_steps cuts off
        epoch_batches(index, samples, global_batch_size, seed, epoch, order)[
            : (steps - done) * global_batch_size
        ]
        for epoch, done in enumerate(range(0, steps, per_epoch))
    ]
    costs = index.lengths if costs is None else costs

    def keeps(order: np.ndarray, micro_batches: int) -> bool:
        num_bins = world_size * micro_batches
        epoch = _Epoch(order, deal_all(costs[order], global_batch_size, num_bins), global_batch_size)
        over = epoch.loads(index.lengths, num_bins) > micro_batch_tokens
        return not np.any(over & (epoch.loads(np.ones_like(index.lengths), num_bins) > 1))

    # a longer sample fills one bin, not several
    capped = np.minimum(index.lengths, micro_batch_tokens).astype(np.int64)
    most = max(_batch_sums(capped[order], global_batch_size).max() for order in orders)
    micro_batches = max(1, -(-int(most) // (world_size * micro_batch_tokens)))
    while not all(keeps(order, micro_batches) for order in orders):
        micro_batches += 1
    return micro_batches


def _all_of(index: LengthIndex) -> np.ndarray:
    return np.arange(len(index.lengths))


def _batch_sums(values: np.ndarray, batch_size: int) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), batch_size))


def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    """From the raw bits of a generator of its own: NumPy keeps those the same in every version."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
