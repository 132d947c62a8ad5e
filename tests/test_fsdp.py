"""FSDP2 beyond the gradients of one step: created in slices, stopped and continued under another strategy."""

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_trainer
from safetensors.torch import load_file
from training_processes import run_ranks, train_step

from morebench.config.schema import Config, Step, Strategy
from morebench.errors import EXIT_INTERRUPTED, EXIT_USER
from morebench.models.mllm import MLLM
from morebench.training.run import train

STOPPED_AFTER = 3


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A single device. Checkpoints are written only when asked to stop."""
    config = make_cell(tmp_path_factory.mktemp("cell"))
    return with_trainer(config, checkpoint_every_n_steps=1000, micro_batch_tokens=400)


@pytest.fixture(scope="module")
def two(one: Config) -> Config:
    return with_trainer(one, strategy=Strategy.fsdp2, devices=2)


@pytest.fixture(scope="module")
def parents(one: Config, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Step, Path]:
    folder = tmp_path_factory.mktemp("pretrained")
    train(one, Step.pretrain, folder, {})
    return {Step.pretrain: folder}


@pytest.fixture(scope="module")
def whole(one: Config, parents: Mapping[Step, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finetune run of a single device."""
    folder = tmp_path_factory.mktemp("whole")
    train(one, Step.finetune, folder, parents)
    return folder


@pytest.fixture(scope="module")
def sharded(two: Config, parents: Mapping[Step, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of two ranks; each notes what it held and read."""
    folder = tmp_path_factory.mktemp("sharded")
    assert run_ranks(2, _noting, two, folder, parents) == [0, 0]
    return folder


def _noting(config: Config, folder: Path, parents: Mapping[Step, Path]) -> None:
    from morebench.models.stored import StoredTensors
    from morebench.training.dry_step import DryStep
    from morebench.training.sharding_fsdp import FullySharded

    noted: dict[str, Any] = {"read": 0}
    read, place, dry_step = StoredTensors.read, FullySharded.place, DryStep.on_train_start

    def noting_read(self: StoredTensors, name: str, start: int, stop: int) -> torch.Tensor:
        noted["read"] += stop - start
        return read(self, name, start, stop)

    def noting_place(self: FullySharded, mllm: MLLM, *rest: Any) -> None:
        noted["before"] = sum(not value.is_meta for value in mllm.llm.parameters())
        place(self, mllm, *rest)
        values = [value for _, value in mllm.llm.named_parameters()]
        noted["held"] = sum(value.to_local().numel() for value in values)
        noted["wholes"] = sum(value.numel() for value in values)
        noted["most_rows"] = sum(-(-value.shape[0] // 2) * value[0].numel() for value in values)

    def noting_dry_step(self: DryStep, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(3)
        random = torch.get_rng_state()
        dry_step(self, trainer, pl_module)
        noted["gradients_left"] = sum(value.grad is not None for value in pl_module.parameters())
        noted["random_drawn"] = not torch.equal(random, torch.get_rng_state())

    StoredTensors.read = noting_read  # type: ignore[method-assign]
    FullySharded.place = noting_place  # type: ignore[method-assign]
    DryStep.on_train_start = noting_dry_step  # type: ignore[method-assign]
    rank = os.environ["LOCAL_RANK"]
    train_step(config, Step.finetune, folder, parents)
    (folder / f"noted{rank}.json").write_text(json.dumps(noted))


def same(folder: Path, expected: Path) -> None:
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
    for part in ("projector", "llm"):
        found, wanted = (load_file(path / f"{part}.safetensors") for path in (folder, expected))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype is torch.float32
            # Adam enlarges a tiny gradient's rounding
            assert (found[name] - value).norm() < 1e-4 * value.norm().clamp(min=1e-6)


def bit_equal(folder: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in metrics(folder)] == [line[key] for line in metrics(expected)]
    for part in ("projector", "llm"):
        one, other = (path / f"{part}.safetensors" for path in (folder, expected))
        assert one.read_bytes() == other.read_bytes()


def test_two_ranks_train_what_one_trains(sharded: Path, whole: Path) -> None:
    same(sharded, whole)


def test_no_rank_ever_holds_or_reads_the_whole_llm(sharded: Path) -> None:
    noted = [json.loads((sharded / f"noted{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["before"] for one in noted] == [0, 0]
    for one in noted:
        assert one["read"] == one["held"] <= one["most_rows"] < one["wholes"]
    assert sum(one["read"] for one in noted) == noted[0]["wholes"]


def test_the_dry_step_leaves_no_trace(sharded: Path) -> None:
    for rank in (0, 1):
        noted = json.loads((sharded / f"noted{rank}.json").read_text())
        assert (noted["gradients_left"], noted["random_drawn"]) == (0, False)


def test_stopped_and_continued_under_itself_and_on_a_single_device(
    one: Config, two: Config, parents: Mapping[Step, Path], sharded: Path, whole: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "two_two"
    assert run_ranks(2, _stopping, two, stopped, parents) == [EXIT_INTERRUPTED, EXIT_INTERRUPTED]
    assert len(metrics(stopped)) == STOPPED_AFTER
    shutil.copytree(stopped, tmp_path / "two_one")
    assert run_ranks(2, train_step, two, Step.finetune, stopped, parents) == [0, 0]
    bit_equal(stopped, sharded)
    train(one, Step.finetune, tmp_path / "two_one", parents)
    same(tmp_path / "two_one", whole)
    manifest = json.loads((tmp_path / "two_one" / "manifest.json").read_text())
    assert manifest["anomalies"] == ["went on after 3 optimizer steps on another machine: not bit-exact"]


def test_stopped_on_a_single_device_and_continued_by_two_ranks(
    one: Config, two: Config, parents: Mapping[Step, Path], whole: Path, tmp_path: Path
) -> None:
    assert run_ranks(1, _stopping, one, tmp_path, parents) == [EXIT_INTERRUPTED]
    assert run_ranks(2, train_step, two, Step.finetune, tmp_path, parents) == [0, 0]
    same(tmp_path, whole)


def test_out_of_memory_of_one_rank_ends_both(two: Config, tmp_path: Path) -> None:
    codes = run_ranks(2, _rank_1_is_small, two, Step.pretrain, tmp_path, {})
    assert codes[1] == EXIT_USER
    assert codes[0] not in (0, None)


def _rank_1_is_small(*arguments: Any) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        MLLM.embed = _out_of_memory  # type: ignore[method-assign]
    train_step(*arguments)


def _out_of_memory(*_: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _stopping(config: Config, folder: Path, parents: Mapping[Step, Path]) -> None:
    from morebench.training.module import StageModule

    training_step, rank = StageModule.training_step, os.environ["LOCAL_RANK"]

    def asking_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if self.next_step == STOPPED_AFTER - 1 and rank == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        return training_step(self, batch, batch_idx)

    StageModule.training_step = asking_step  # type: ignore[method-assign]
    train_step(config, Step.finetune, folder, parents)
