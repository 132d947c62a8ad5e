"""Every sample once, the same batch on any machine, bins that partition it and keep to the budget."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morebench.config.schema import Order
from morebench.data.index import LengthIndex
from morebench.data.packing import (
    BatchPlan,
    deal,
    deal_all,
    epoch_order,
    micro_batches_for,
    num_optimizer_steps,
)


def make_index(num_samples: int, seed: int = 0, text_share: float = 0.3) -> LengthIndex:
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.lognormal(4, 0.7, num_samples), 900).astype(np.int32) + 5
    return LengthIndex(
        lengths=lengths,
        supervised=lengths // 3,
        num_images=(generator.random(num_samples) >= text_share).astype(np.int32),
        truncated=0,
        unsupervised=0,
    )


def make_plan(index: LengthIndex, **changes: Any) -> BatchPlan:
    arguments: dict[str, Any] = {
        "global_batch_size": 8,
        "epochs": 1,
        "max_steps": None,
        "seed": 0,
        "order": Order.uniform,
        "world_size": 1,
        "micro_batches": 1,
    }
    return BatchPlan(index, **arguments | changes)


plans = st.fixed_dictionaries(
    {
        "global_batch_size": st.integers(1, 20),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "order": st.sampled_from(list(Order)),
        "world_size": st.integers(1, 4),
        "micro_batches": st.integers(1, 4),
    }
)


@given(num_samples=st.integers(1, 70), arguments=plans, text_share=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=80, deadline=None)
def test_an_epoch_sees_every_sample_once(num_samples: int, arguments: dict[str, Any], text_share: float):
    plan = make_plan(make_index(num_samples, text_share=text_share), **arguments)
    batches = [plan.global_batch(step) for step in range(plan.num_steps)]
    per_epoch = plan.num_steps // arguments["epochs"]
    for epoch in range(arguments["epochs"]):
        own = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(own).tolist()) == list(range(num_samples))
        assert all(len(batch) == arguments["global_batch_size"] for batch in own[:-1])
        assert 0 < len(own[-1]) <= arguments["global_batch_size"]


@given(num_samples=st.integers(1, 70), arguments=plans, other=plans)
@settings(max_examples=80, deadline=None)
def test_bins_partition_a_batch_that_no_machine_changes(
    num_samples: int, arguments: dict[str, Any], other: dict[str, Any]
):
    index = make_index(num_samples)
    plan = make_plan(index, **arguments)
    machine = {key: other[key] for key in ("world_size", "micro_batches")}
    elsewhere = make_plan(index, **(arguments | machine))
    assert plan.num_steps == elsewhere.num_steps
    for step in range(plan.num_steps):
        batch = plan.global_batch(step)
        np.testing.assert_array_equal(batch, elsewhere.global_batch(step))
        assert (
            plan.supervised_tokens(step) == elsewhere.supervised_tokens(step) == index.supervised[batch].sum()
        )
        for each in (plan, elsewhere):
            owned = [
                each.bin(step, rank, k) for rank in range(each.world_size) for k in range(each.micro_batches)
            ]
            assert sorted(number for members in owned for number in members) == sorted(batch.tolist())
            assert sorted(owned) == sorted(each.bins(step))  # no bin is run twice or by nobody


def test_a_plan_made_anew_is_the_same():
    index = make_index(100)
    first, again = (make_plan(index, world_size=2, micro_batches=3, epochs=2) for _ in range(2))
    for step in reversed(range(first.num_steps)):  # nor does the order of asking matter
        assert again.bins(step) == first.bins(step)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(1000, 0, 0).tolist() == orders[0]
    np.random.seed(3)
    assert epoch_order(1000, 0, 0).tolist() == orders[0]


def test_the_order_is_pinned():
    """Changing it changes every trained model: a new numerics version."""
    assert epoch_order(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


@given(
    num_images=st.integers(0, 60),
    num_texts=st.integers(0, 60),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_modality_order_mixes_only_the_leftovers(num_images: int, num_texts: int, batch_size: int, seed: int):
    if num_images + num_texts == 0:
        return
    index = make_index(num_images + num_texts)
    kinds = np.random.default_rng(seed).permutation([1] * num_images + [0] * num_texts).astype(np.int32)
    index = LengthIndex(index.lengths, index.supervised, kinds, 0, 0)
    plan = make_plan(index, order=Order.modality, global_batch_size=batch_size, seed=seed)
    shares = [(kinds[plan.global_batch(step)] > 0).mean() for step in range(plan.num_steps)]
    assert sum(0 < share < 1 for share in shares) <= 1


def test_modality_order_shuffles_the_kinds_of_batches():
    index = make_index(800, text_share=0.5)
    plan = make_plan(index, order=Order.modality)
    kinds = [bool(index.num_images[plan.global_batch(step)].all()) for step in range(plan.num_steps)]
    assert 20 < sum(a != b for a, b in pairwise(kinds)) < 80


@given(
    num_samples=st.integers(1, 60),
    budget=st.integers(50, 2000),
    world_size=st.integers(1, 4),
    order=st.sampled_from(list(Order)),
)
@settings(max_examples=60, deadline=None)
def test_the_token_budget_is_kept_by_one_number(num_samples: int, budget: int, world_size: int, order: Order):
    index = make_index(num_samples)
    arguments = {"global_batch_size": 16, "epochs": 2, "max_steps": None, "seed": 0, "order": order}
    arguments |= {"world_size": world_size, "costs": index.lengths.astype(np.int64) ** 2}
    chosen = micro_batches_for(index, micro_batch_tokens=budget, **arguments)

    def keeps(micro_batches: int) -> bool:
        plan = BatchPlan(index, micro_batches=micro_batches, **arguments)
        bins = [members for step in range(plan.num_steps) for members in plan.bins(step)]
        return all(len(members) < 2 or index.lengths[members].sum() <= budget for members in bins)

    assert keeps(chosen)
    assert not any(keeps(fewer) for fewer in range(1, chosen))


def test_ranks_and_bins_cost_nearly_the_same():
    index = make_index(4096)
    plan = make_plan(index, global_batch_size=128, world_size=4, micro_batches=3)
    for step in range(plan.num_steps):
        loads = np.array(
            [[index.lengths[plan.bin(step, rank, k)].sum() for k in range(3)] for rank in range(4)]
        )
        assert loads.max() / loads.mean() < 1.06  # what waits for the dearest bin
        assert loads.sum(1).max() / loads.sum(1).mean() < 1.03


def test_dear_bins_go_to_each_rank_in_turn():
    lengths = np.array([5, 6, 7, 8], np.int32)
    plan = make_plan(LengthIndex(lengths, lengths, lengths, 0, 0), world_size=2, micro_batches=2)
    assert [[plan.bin(0, rank, k) for k in range(2)] for rank in range(2)] == [[[3], [0]], [[2], [1]]]


def test_more_bins_than_samples():
    plan = make_plan(make_index(6), world_size=4, micro_batches=2)
    assert [len(members) for members in plan.bins(0)] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert plan.idle_share == 0.25
    assert make_plan(make_index(6), world_size=3, micro_batches=2).idle_share == 0


def test_dealing_by_hand():
    """Pinned: a resumed run must deal as it did before."""
    assert deal(np.array([[3, 9, 4, 4, 2], [1, 1, 1, 1, 1]]), 2).tolist() == [
        [1, 0, 1, 1, 0],
        [0, 1, 0, 1, 0],
    ]
    assert deal(np.zeros((1, 0), np.int64), 2).tolist() == [[]]
    assert deal_all(np.array([5, 1, 2, 7, 3]), batch_size=2, num_bins=2).tolist() == [0, 1, 1, 0, 0]


@given(
    costs=st.lists(st.lists(st.integers(0, 2**50), min_size=6, max_size=6), min_size=1, max_size=4),
    num_bins=st.integers(1, 8),
)
@settings(max_examples=80, deadline=None)
def test_all_batches_at_once_are_dealt_as_one_by_one(costs: list[list[int]], num_bins: int):
    """The dearest sample left goes to the bin with the least, in whole numbers of Python."""
    for row, bins in zip(costs, deal(np.array(costs), num_bins).tolist(), strict=True):
        loads, places = [0] * num_bins, [0] * len(row)
        for member in sorted(range(len(row)), key=lambda number: -row[number]):
            places[member] = loads.index(min(loads))
            loads[places[member]] += row[member]
        rank = sorted(range(num_bins), key=lambda number: -loads[number])
        assert bins == [rank.index(place) for place in places]


def test_loads_and_the_heaviest_are_those_of_the_bins():
    index = make_index(101)
    weights = index.lengths.astype(np.int64) ** 2
    plan = make_plan(index, world_size=2, micro_batches=2, epochs=2, max_steps=20)
    loads = [[int(weights[members].sum()) for members in plan.bins(step)] for step in range(20)]
    assert plan.loads(weights).tolist() == loads
    step, members = plan.heaviest(weights)
    assert weights[members].sum() == max(max(row) for row in loads)
    assert members in plan.bins(step)


def test_costs_decide_how_a_batch_is_dealt_and_not_which_samples_it_has():
    index = make_index(200)
    costs = np.random.default_rng(1).integers(1, 2**48, 200)
    by_tokens, by_costs = (make_plan(index, world_size=4, **more) for more in ({}, {"costs": costs}))
    assert by_costs.balance() > 0.5
    assert [by_tokens.global_batch(step).tolist() for step in range(25)] == [
        by_costs.global_batch(step).tolist() for step in range(25)
    ]
    assert by_tokens.bins(3) != by_costs.bins(3)
    spread = [
        float(np.mean(loads.mean(1) / loads.max(1)))
        for loads in (plan.loads(costs) for plan in (by_tokens, by_costs))
    ]
    assert by_costs.balance() == spread[1] > spread[0]


@pytest.mark.parametrize(
    ("num_samples", "batch", "epochs", "max_steps", "steps"),
    [(558_128, 256, 1, None, 2181), (665_298, 128, 1, None, 5198), (10, 4, 3, None, 9), (10, 4, 3, 5, 5)],
)
def test_numbers_of_steps(num_samples: int, batch: int, epochs: int, max_steps: int | None, steps: int):
    assert num_optimizer_steps(num_samples, batch, epochs, max_steps) == steps


def test_steps_beyond_the_plan():
    plan = make_plan(make_index(20), max_steps=2)
    assert plan.num_steps == 2
    with pytest.raises(IndexError):
        plan.global_batch(2)
