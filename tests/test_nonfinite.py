"""Optimizer steps with NaN: left out as often as the recipe allows, on all ranks alike, or the run's end."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_recipe, with_trainer
from torch import nn
from training_processes import run_ranks, train_step

from morebench.config.schema import Config, Step
from morebench.errors import EXIT_NAN, NonFiniteError
from morebench.models.mllm import MLLM
from morebench.training.module import StageModule
from morebench.training.nonfinite import group_of
from morebench.training.run import train
from morebench.training.strategy import make_trainer, sharding_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return with_recipe(make_cell(tmp_path_factory.mktemp("cell")), max_skipped_steps=2)


def poison(steps: set[int], patch: pytest.MonkeyPatch, rank: str | None = None) -> None:
    """The loss of every micro-batch of these optimizer steps is NaN, maybe on one rank alone."""
    forward, training_step = MLLM.forward, StageModule.training_step
    now = [-1]

    def noting_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        now[0] = self.next_step
        return training_step(self, batch, batch_idx)

    def bad_forward(self: MLLM, batch: Any) -> Any:
        is_bad = now[0] in steps and rank in (None, os.environ.get("LOCAL_RANK"))
        return forward(self, batch) * (float("nan") if is_bad else 1.0)

    patch.setattr(StageModule, "training_step", noting_step)
    patch.setattr(MLLM, "forward", bad_forward)


def test_steps_are_left_out_and_counted_over_a_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended by one NaN too many and allowed more, a run ends as one that was allowed more at once."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    poison({0, 3, 5}, monkeypatch)
    train(with_recipe(config, max_skipped_steps=3), Step.pretrain, whole, {})
    lines = metrics(whole)
    assert [line["loss"] is None for line in lines] == [True, False, False, True, False, True]
    assert [line["grad_norm"] is None for line in lines] == [True, False, False, True, False, True]
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2, 2, 3]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["anomalies"] == [
        "optimizer steps [0, 3, 5] were left out: their loss or gradients were not finite"
    ]
    with pytest.raises(NonFiniteError, match=r"=2 allows no further one after leaving out steps \[0, 3\]"):
        train(config, Step.pretrain, stopped, {})
    train(with_recipe(config, max_skipped_steps=3), Step.pretrain, stopped, {})
    assert losses(stopped) == losses(whole)
    assert json.loads((stopped / "manifest.json").read_text())["anomalies"] == manifest["anomalies"]
    name = "projector.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_one_too_many_leaves_the_checkpoint_and_says_what_was_in_the_batch(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({4}, monkeypatch)
    several = with_trainer(config, micro_batch_tokens=300, checkpoint_every_n_steps=4)
    strict = with_recipe(several, max_skipped_steps=0)
    with pytest.raises(NonFiniteError, match=r"Optimizer step 4: loss nan.* samples: s\d+, s\d+") as caught:
        train(strict, Step.pretrain, tmp_path, {})
    assert caught.value.exit_code == EXIT_NAN
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "step_00000004"  # of the four good steps
    dump = json.loads((tmp_path / "nonfinite" / "step_00000004.json").read_text())
    assert (dump["step"], dump["loss"], dump["grad_norm"]) == (4, "nan", "nan")
    assert dump["grad_norms"] == {"projector.0": "nan", "projector.2": "nan"}
    micro_batches = json.loads((tmp_path / "manifest.json").read_text())["micro_batches"]
    assert len(dump["micro_batches"]) == micro_batches > 1
    samples = [sample for one in dump["micro_batches"] for sample in one["samples"]]
    assert len({sample["index"] for sample in samples}) == 16
    assert all(sample["id"] == f"s{sample['index']}" for sample in samples)


def test_leaving_out_changes_no_weight_and_no_moment(config: Config) -> None:
    sharding = sharding_of(make_trainer(config.trainer, config.stage.pretrain))
    torch.manual_seed(0)
    trained = {"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2))}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1, fused=True)

    def step() -> None:
        for value in trained.values():
            value.grad = torch.randn_like(value)
        optimizer.step()

    step()
    before = {
        key: value.clone()
        for key, value in (
            (key, piece.values)
            for pieces in (sharding.parameters(trained), sharding.optimizer_state(optimizer, trained))
            for key, piece in pieces.items()
        )
    }
    for value in trained.values():
        value.grad = torch.full_like(value, float("nan"))
    sharding.leave_out(optimizer, trained)
    optimizer.step()
    after = sharding.parameters(trained) | sharding.optimizer_state(optimizer, trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key].values) for key in before)


def test_two_ranks_leave_out_what_one_of_them_saw(config: Config, tmp_path: Path) -> None:
    two = with_trainer(config, devices=2)
    assert run_ranks(2, _poisoned_rank_1, two, {2}, tmp_path) == [0, 0]
    assert [line["skipped"] for line in metrics(tmp_path)] == [0, 0, 1, 1, 1, 1]
    dump = json.loads((tmp_path / "nonfinite" / "step_00000002.json").read_text())
    seen = {one["rank"]: one["loss_sum"] for one in dump["micro_batches"]}
    assert isinstance(seen[0], float)
    assert seen[1] == "nan"


def test_a_block_is_a_group_and_so_is_what_stands_outside() -> None:
    assert group_of("llm.model.layers.3.mlp.up_proj.weight") == "llm.model.layers.3"
    assert group_of("llm.model.embed_tokens.weight") == "llm.model.embed_tokens"


def _poisoned_rank_1(config: Config, steps: set[int], folder: Path) -> None:
    poison(steps, pytest.MonkeyPatch(), rank="1")
    train_step(config, Step.pretrain, folder, {})
