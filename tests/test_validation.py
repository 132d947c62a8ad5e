"""The validation slice: who is in it, and that training does not notice it."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_recipe, with_trainer
from lightning.pytorch import Trainer
from training_processes import run_ranks, train_step

from morebench.config.schema import Config, Step, TrainingData
from morebench.data.batch import Batch
from morebench.data.checking.check import check_data
from morebench.data.records import Sample, Turn
from morebench.data.validation import validation_slice
from morebench.errors import ConfigError
from morebench.training.module import StageModule
from morebench.training.run import train
from morebench.training.stage import make_stage
from morebench.training.validation import Validation, validation_steps

HELD_OUT = 10


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def config(plain: Config) -> Config:
    return with_trainer(with_recipe(plain, validation_samples=HELD_OUT), micro_batch_tokens=300)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(config, Step.pretrain, folder, {})
    return folder


def validation_losses(folder: Path) -> list[float | None]:
    return [line["validation_loss"] for line in metrics(folder)]


def samples(count: int) -> list[Sample]:
    return [Sample(f"s{number}", ("a.png",), (Turn("What?", f"{number}"),)) for number in range(count)]


def chosen_ids(some: list[Sample], count: int, cache: Path) -> set[str]:
    return {some[number].id for number in validation_slice(some, count, "content", cache).tolist()}


def test_slice_depends_on_no_order_and_a_larger_one_contains_it(tmp_path: Path) -> None:
    some = samples(50)
    ids = [chosen_ids(some, count, tmp_path / "a") for count in (0, 1, 10, 50)]
    assert [len(one) for one in ids] == [0, 1, 10, 50]
    assert all(small <= large for small, large in pairwise(ids))
    assert chosen_ids(some[::-1], 10, tmp_path / "b") == ids[2]
    half = {one.id for one in some[::2]}
    assert ids[2] & half <= chosen_ids(some[::2], 10, tmp_path / "c")  # whoever else there is


def test_another_text_is_another_place(tmp_path: Path) -> None:
    some = samples(50)
    other = [replace(one, turns=(Turn("What?", "other"),)) for one in some]
    assert chosen_ids(some, 10, tmp_path / "a") != chosen_ids(other, 10, tmp_path / "b")


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    before = chosen_ids(samples(50), 10, tmp_path)
    (file,) = (tmp_path / "validation").iterdir()
    file.write_bytes(b"damaged")
    assert chosen_ids(samples(50), 10, tmp_path) == before


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(100, set(range(9, 100, 10))), (6, set(range(6))), (1, {0}), (15, None)]
)
def test_evaluations_are_evenly_spaced_and_the_last_step_is_one(num_steps: int, expected: set[int]) -> None:
    found = validation_steps(num_steps)
    assert num_steps - 1 in found
    assert all(0 <= step < num_steps for step in found)
    assert expected is None or found == expected


def test_training_does_not_notice_that_the_loss_is_measured(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "is_due", lambda self, step: False)
    train(config, Step.pretrain, tmp_path, {})
    assert losses(tmp_path) == losses(whole)
    assert [line["grad_norm"] for line in metrics(tmp_path)] == [line["grad_norm"] for line in metrics(whole)]
    name = "projector.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert validation_losses(tmp_path) == [None] * len(validation_losses(whole))


def test_measuring_leaves_no_trace(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with dropout, say, would draw in training, and would not in eval mode."""
    loss, seen = Validation.loss, []

    def drawing_step(self: StageModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), self.mllm.get_submodule("llm").training))
        torch.rand(3)
        return self.mllm(batch)

    def watched_loss(self: Validation, trainer: Trainer, module: StageModule) -> float:
        before = torch.get_rng_state()
        measured = loss(self, trainer, module)
        assert torch.equal(torch.get_rng_state(), before)
        assert module.mllm.get_submodule("llm").training
        return measured

    monkeypatch.setattr(StageModule, "validation_step", drawing_step)
    monkeypatch.setattr(Validation, "loss", watched_loss)
    train(with_recipe(config, max_steps=1), Step.pretrain, tmp_path, {})
    assert set(seen) == {(False, False)}


def test_training_is_that_on_data_without_the_slice(
    plain: Config, config: Config, whole: Path, tmp_path: Path
) -> None:
    held_out = set(make_stage(config, Step.pretrain, {}).validation.tolist())
    assert len(held_out) == HELD_OUT
    data = plain.pretrain_data
    there, less = (Path(plain.paths.data) / name for name in (data.folder, "less"))
    shutil.copytree(there, less)
    records = json.loads((there / data.records).read_text())
    kept = [record for number, record in enumerate(records) if number not in held_out]
    (less / data.records).write_text(json.dumps(kept))
    smaller: TrainingData = replace(data, folder="less", num_samples=len(kept))
    without = with_trainer(replace(plain, pretrain_data=smaller), micro_batch_tokens=300)
    check_data(smaller, without.paths, 0, lambda text: None)
    train(without, Step.pretrain, tmp_path / "run", {})
    assert losses(tmp_path / "run") == losses(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["data"]["num_samples"], manifest["data"]["validation_samples"]) == (44, HELD_OUT)


def test_validation_loss_is_the_mean_over_the_supervised_tokens_of_the_slice(
    config: Config, whole: Path
) -> None:
    """The last value is that of the weights the step ends with; here sample by sample."""
    stage = make_stage(config, Step.finetune, {Step.pretrain: whole})
    held_out = stage.validation.tolist()
    dataset = stage.dataset(stage.validation_plan(1, 10**6), 0)
    total, supervised = 0.0, 0
    with torch.no_grad():
        for number in held_out:
            batch = dataset.micro_batch(0, [number])
            total += stage.mllm(batch).item()
            supervised += len(batch.targets)
    assert validation_losses(whole)[-1] == pytest.approx(total / supervised, rel=1e-6)
    training = json.loads((whole / "manifest.json").read_text())["training"]
    assert training["validation_loss"] == validation_losses(whole)[-1]


def test_two_ranks_measure_what_one_measures(config: Config, whole: Path, tmp_path: Path) -> None:
    """After the first step, whose learning rate is 0, the weights are the same to the bit."""
    two = with_trainer(config, devices=2)
    assert run_ranks(2, train_step, two, Step.pretrain, tmp_path, {}) == [0, 0]
    found, expected = validation_losses(tmp_path), validation_losses(whole)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [44, 1000])
def test_a_slice_as_large_as_the_data_is_refused(config: Config, tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"validation_samples={count:,} leaves nothing .*: Toy has 44 us"):
        train(with_recipe(config, validation_samples=count), Step.pretrain, tmp_path, {})
