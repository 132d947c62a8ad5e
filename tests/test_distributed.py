"""Two gloo ranks on the CPU: the same maths as one, and nobody waits for ever."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from factories_training import losses, make_cell, metrics, with_trainer
from safetensors.torch import load_file
from training_processes import run_ranks, train_step

from morebench.config.schema import Config, Step
from morebench.errors import EXIT_INTERRUPTED
from morebench.training.run import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cell")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return make_cell(root)


@pytest.fixture(scope="module")
def whole(root: Path, config: Config) -> Path:
    """The run of one rank."""
    train(config, Step.pretrain, root / "whole", {})
    return root / "whole"


def test_two_ranks_train_what_one_trains(config: Config, whole: Path, tmp_path: Path) -> None:
    two = with_trainer(config, devices=2, micro_batch_tokens=300)
    assert run_ranks(2, train_step, two, Step.pretrain, tmp_path, {}) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    for field in ("step", "tokens", "supervised_tokens", "lr"):
        assert [line[field] for line in metrics(tmp_path)] == [line[field] for line in metrics(whole)]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}


def test_signal_to_one_rank_stops_both_and_either_number_of_ranks_continues(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    """In the middle of an accumulation of three micro-batches."""
    two = with_trainer(config, devices=2, micro_batch_tokens=300)
    assert run_ranks(2, _signal_rank_1, two, tmp_path) == [EXIT_INTERRUPTED, EXIT_INTERRUPTED]
    assert json.loads((tmp_path / "manifest.json").read_text())["micro_batches"] == 3
    assert len(metrics(tmp_path)) == 3
    train(config, Step.pretrain, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["anomalies"] == ["went on after 3 optimizer steps on another machine: not bit-exact"]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = (load_file(folder / "projector.safetensors") for folder in (tmp_path, whole))
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm()  # Adam enlarges a tiny gradient's rounding


def _signal_rank_1(config: Config, folder: Path) -> None:
    from morebench.training.module import StageModule

    training_step = StageModule.training_step

    def asking_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.next_step, batch_idx % 3) == (2, 1) and os.environ["LOCAL_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    StageModule.training_step = asking_step  # type: ignore[method-assign]
    train_step(config, Step.pretrain, folder, {})
