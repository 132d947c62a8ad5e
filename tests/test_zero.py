"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo ranks on the CPU: the same maths as one plain rank."""

from pathlib import Path

import pytest
from factories_training import make_cell, with_trainer
from gradients import distance, from_file, ours_to_file, stock
from training_processes import run_ranks

from morebench.config.schema import Config, Step, Strategy
from morebench.training.run import train

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

STRATEGIES = [Strategy.zero2, Strategy.zero3]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_have_the_gradients_of_one(
    config: Config, whole: Path, tmp_path: Path, strategy: Strategy
) -> None:
    config = with_trainer(config, strategy=strategy)
    assert run_ranks(2, ours_to_file, config, 3, whole, tmp_path) == [0, 0]
    expected_loss, expected = stock(with_trainer(config, strategy=Strategy.auto), whole)
    for rank in (0, 1):
        loss, gradients = from_file(tmp_path / f"rank{rank}.safetensors")
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert distance(gradients, expected) < 1e-5
