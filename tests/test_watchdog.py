"""A run in which nothing happens any more ends with exit code 75, and its next start goes on."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from factories_training import losses, make_cell, metrics, with_trainer
from training_processes import finish, start, start_ranks, train_step

from morebench.config.schema import Config, Step
from morebench.errors import EXIT_INTERRUPTED
from morebench.training.run import train
from morebench.training.watchdog import Watchdog, group_timeout

MINUTES = 0.05  # three seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


def test_a_stopped_rank_ends_the_others_and_the_run_goes_on(config: Config, tmp_path: Path) -> None:
    two = with_trainer(config, devices=2, hang_timeout_minutes=MINUTES)
    ranks = start_ranks(2, _stop_rank_1, two, tmp_path)
    try:
        assert finish(ranks[0]) == [EXIT_INTERRUPTED]
        log = (tmp_path / "rank0.log").read_text()
    finally:
        ranks[1].kill()
    assert "Rank 0 has got nowhere" in log
    assert "optimizer_step" in log, "the stacks say where"
    assert len(metrics(tmp_path)) == 3
    train(config, Step.pretrain, tmp_path, {})
    assert [line["step"] for line in metrics(tmp_path)] == list(range(6))


def test_a_data_worker_that_hangs_ends_the_run(config: Config, tmp_path: Path) -> None:
    one = with_trainer(config, num_workers=1, hang_timeout_minutes=MINUTES)
    assert finish(start(_hang_at_item_4, one, tmp_path, daemon=False)) == [EXIT_INTERRUPTED]
    assert len(metrics(tmp_path)) <= 4
    worker = int((tmp_path / "worker").read_text())
    with pytest.raises(ProcessLookupError):  # it would hold its memory for ever
        _wait_for_end(worker)
    train(config, Step.pretrain, tmp_path, {})
    assert len(losses(tmp_path)) == 6


def test_the_first_step_may_take_longer_and_collectives_longer_still(config: Config) -> None:
    watchdog = Watchdog(config.trainer.hang_timeout_minutes, rank=0)
    timeout = group_timeout(config.trainer)
    assert timeout is not None
    assert timeout.total_seconds() > watchdog._limit > 60 * config.trainer.hang_timeout_minutes


def _stop_rank_1(config: Config, folder: Path) -> None:
    from morebench.training.module import StageModule

    rank = os.environ["LOCAL_RANK"]
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    training_step = StageModule.training_step

    def stopping_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if self.next_step == 3 and rank == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return training_step(self, batch, batch_idx)

    StageModule.training_step = stopping_step  # type: ignore[method-assign]
    train_step(config, Step.pretrain, folder, {})


def _hang_at_item_4(config: Config, folder: Path) -> None:
    from morebench.data.datamodule import MicroBatches

    multiprocessing.set_start_method("fork", force=True)  # workers get what is patched here
    get_item = MicroBatches.__getitem__

    def hanging_item(self: MicroBatches, item: int) -> Any:
        if item == 4:
            (folder / "worker").write_text(str(os.getpid()))
            time.sleep(3600)
        return get_item(self, item)

    MicroBatches.__getitem__ = hanging_item  # type: ignore[method-assign]
    train_step(config, Step.pretrain, folder, {})


def _wait_for_end(pid: int) -> None:
    for _ in range(200):
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        if state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            raise ProcessLookupError(f"{pid} is dead, and nobody has asked after it yet")
        time.sleep(0.05)
