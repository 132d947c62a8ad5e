import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_trainer
from training_processes import (
    NO_DISK,
    finish,
    start,
    train_on_a_full_disk,
    train_until_fsync,
    train_until_line,
    train_until_save,
)

from morebench.config.schema import Config, Step
from morebench.errors import EXIT_USER, DiskFullError, Interrupted, RunError
from morebench.training import writing
from morebench.training.fragments import read_whole
from morebench.training.fragments import whole as whole_piece
from morebench.training.module import StageModule
from morebench.training.resume import newest_checkpoint
from morebench.training.run import train
from morebench.training.telemetry import MetricsFile
from morebench.training.watchdog import Watchdog
from morebench.training.writing import save_checkpoint

TENSORS = {"parameters": {"a": whole_piece(torch.zeros(1))}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(config, Step.pretrain, folder, {})
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert [line["step"] for line in metrics(folder)] == list(range(6))
    name = "projector.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_at_a_step_continues_to_the_same_bits(
    config: Config, whole: Path, tmp_path: Path, step: int
) -> None:
    assert finish(start(train_until_line, step, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


@pytest.fixture(scope="module")
def half(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a checkpoint of two optimizer steps, to be copied."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_after(2, config, folder, patch)
    return folder


@pytest.mark.parametrize("where", ["in a file", "between files", "before the rename", "before the removal"])
def test_killed_while_a_checkpoint_is_written(
    config: Config, whole: Path, half: Path, tmp_path: Path, where: str
) -> None:
    """The one before must still be there, and be used."""
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    assert finish(start(train_until_save, where, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    names = {path.name.partition(".tmp-")[0] for path in (tmp_path / "checkpoints").iterdir()}
    unfinished = "step_00000004" if where == "before the removal" else ".step_00000004"
    assert names == {"step_00000002", unfinished}
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_training_goes_on_while_a_checkpoint_is_written(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is due after step 1; what comes due meanwhile waits for it."""
    reached = threading.Event()
    append, save_file = MetricsFile.append, writing.save_file

    def telling_append(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 3:
            reached.set()

    def waiting_save(values: dict[str, torch.Tensor], path: Path) -> None:
        assert reached.wait(60), "training waits for the checkpoint"
        save_file(values, path)

    monkeypatch.setattr(MetricsFile, "append", telling_append)
    monkeypatch.setattr(writing, "save_file", waiting_save)
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_a_long_save_that_gets_on_keeps_the_watchdog_quiet(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a request to stop, each file waits until the watchdog has heard of the one before."""
    heard = threading.Semaphore(0)
    beat, save_file = Watchdog.beat, writing.save_file

    def counted_beat(self: Watchdog, where: str) -> None:
        beat(self, where)
        if "waiting for a checkpoint" in where:
            heard.release()

    def slow_save(values: dict[str, torch.Tensor], path: Path) -> None:
        assert heard.acquire(timeout=60), "no beat"
        save_file(values, path)

    monkeypatch.setattr(Watchdog, "beat", counted_beat)
    monkeypatch.setattr(writing, "save_file", slow_save)
    _interrupt_after(2, with_trainer(config, checkpoint_every_n_steps=100), tmp_path, monkeypatch)
    assert newest_checkpoint(tmp_path / "checkpoints", print) is not None


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "full"), DiskFullError), (PermissionError(errno.EACCES, "no"), PermissionError)],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_last(
    config: Config,
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    raised: type[Exception],
) -> None:
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)

    def failing_save(values: dict[str, torch.Tensor], path: Path) -> None:
        raise error

    monkeypatch.setattr(writing, "save_file", failing_save)
    with pytest.raises(raised):
        train(config, Step.pretrain, tmp_path, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_disk_that_is_full_ends_the_run_which_goes_on_when_there_is_room(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    """On a small disk of its own: the files of a run are kept there through full and free again."""
    (code,) = finish(start(train_on_a_full_disk, config, Step.pretrain, tmp_path / "disk", tmp_path / "run"))
    if code == NO_DISK:
        pytest.skip("needs a mount namespace of its own")
    assert code == 0
    assert_same(tmp_path / "run", whole)


def test_a_jumping_clock_changes_nothing(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days to and fro at every look."""
    now, jumps = time.time, itertools.cycle([86400.0, -86400.0, 0.0])
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (now() + next(jumps))))
    _interrupt_after(3, config, tmp_path, monkeypatch)
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert 0 < manifest["seconds"] < 600


def test_memory_that_runs_out_in_a_later_step_is_no_matter_of_trying_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr(StageModule, "training_step", greedy_step)
    with pytest.raises(RunError, match=r"micro_batch_tokens=50000 .*Tried to allocate") as caught:
        train(config, Step.pretrain, tmp_path, {})
    assert caught.value.exit_code == EXIT_USER


def test_killed_again_and_again_ends_in_the_same_bits(config: Config, whole: Path, tmp_path: Path) -> None:
    """Every start gets a little further before it dies, whatever it is writing then."""
    (tmp_path / ".manifest.json.tmp-1").touch()  # as one leaves that dies while it writes its manifest
    code, count = None, 2
    while code != 0:
        (code,) = finish(start(train_until_fsync, count, config, Step.pretrain, tmp_path))
        assert code in (0, -signal.SIGKILL)
        count += 5
    assert count > 12, "the test must have killed something"
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_saves_at_the_next_step_and_continues(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = [signal.getsignal(known) for known in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]
    with monkeypatch.context() as patch:
        append = MetricsFile.append

        def asking_append(self: MetricsFile, line: dict[str, Any]) -> None:
            append(self, line)
            if line["step"] == 2:
                os.kill(os.getpid(), number)

        patch.setattr(MetricsFile, "append", asking_append)
        with pytest.raises(Interrupted, match=rf"{number.name} asked to stop: saved after 4 of 6"):
            train(config, Step.pretrain, tmp_path, {})
    after = [signal.getsignal(known) for known in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]
    assert after == before
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_signal_in_the_middle_of_accumulation_waits_for_the_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_trainer(config, micro_batch_tokens=300)
    training_step = StageModule.training_step

    def asking_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if self.next_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", asking_step)
    with pytest.raises(Interrupted, match="saved after 2 of 6"):
        train(config, Step.pretrain, tmp_path, {})


def test_threads_and_micro_batches_are_kept_over_a_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`threads: null` means what the machine had when the run began."""
    free = with_trainer(config, threads=None)
    seen = torch.get_num_threads()
    _interrupt_after(1, free, tmp_path, monkeypatch)
    torch.set_num_threads(seen + 1)
    try:
        train(free, Step.pretrain, tmp_path, {})
        assert torch.get_num_threads() == seen + 1
    finally:
        torch.set_num_threads(seen)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["threads"], manifest["anomalies"]) == (seen, [])


def test_resume_with_another_budget_says_that_it_is_not_exact(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(3, config, tmp_path, monkeypatch)
    train(with_trainer(config, micro_batch_tokens=300), Step.pretrain, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["micro_batches"] > 1
    assert manifest["anomalies"] == ["went on after 3 optimizer steps on another machine: not bit-exact"]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_seconds_add_up_over_starts(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_after(3, config, tmp_path, monkeypatch)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", print)
    assert checkpoint is not None
    before = checkpoint.facts["seconds"]
    train(config, Step.pretrain, tmp_path, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["seconds"] > before > 0


def test_killed_after_the_parts_were_written(config: Config, whole: Path, tmp_path: Path) -> None:
    """The checkpoints are still there: the next start removes them and trains nothing."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    save_checkpoint(tmp_path / "checkpoints", 4, TENSORS, {})
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_checkpoint_of_another_model_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(1, config, tmp_path, monkeypatch)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", print)
    assert checkpoint is not None
    stored = {name: checkpoint.pieces(name) for name in ("optimizer", "random")}
    tensors = {
        name: {key: whole_piece(read_whole(pieces, key)) for key in pieces.shapes}
        for name, pieces in stored.items()
    }
    tensors["parameters"] = {
        key: whole_piece(torch.zeros(3)) for key in checkpoint.pieces("parameters").shapes
    }
    save_checkpoint(tmp_path / "checkpoints", 5, tensors, checkpoint.facts)
    with pytest.raises(RunError, match=r"another model: names or shapes differ at .*Remove the run folder's"):
        train(config, Step.pretrain, tmp_path, {})


def _interrupt_after(done: int, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = MetricsFile.append

    def asking_append(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == done - 2 or done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", asking_append)
        with pytest.raises(Interrupted):
            train(config, Step.pretrain, folder, {})
