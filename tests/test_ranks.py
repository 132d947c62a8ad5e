"""Several ranks on one machine: they are one run, whoever of them dies."""

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
from factories_training import losses, make_cell, metrics, with_trainer
from safetensors.torch import load_file
from training_processes import Forked, finish, start

from morebench.config.compose import save_config
from morebench.config.schema import Config, Step, Strategy
from morebench.errors import (
    EXIT_DISK_FULL,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NAN,
    EXIT_USER,
    Interrupted,
    RankError,
    RunError,
    outcome_of,
)
from morebench.matrix import ledger, ranks
from morebench.matrix.launch import default_jobs
from morebench.matrix.ledger import State
from morebench.matrix.ranks import End, local_ranks
from morebench.matrix.step import execute
from morebench.processes import usable_cores
from morebench.training.run import train

STRATEGIES = [Strategy.ddp, Strategy.fsdp2]


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


def planned(folder: Path, config: Config, **trainer: Any) -> Path:
    """What a launch leaves in a run folder before the step starts."""
    folder.mkdir()
    ledger.write_json(folder / "manifest.json", {"run_id": folder.name, "step": "pretrain"})
    ledger.write_json(folder / "cell.json", {"llm": "tiny", "seed": 0})
    ledger.write_json(folder / "parents.json", {})
    save_config(with_trainer(config, **trainer), folder / "config.yaml")
    return folder


def lead(before: Callable[[], None], folder: Path) -> None:
    """A worker's step, in a process of its own."""
    ranks._CONTEXT = Forked(before)  # type: ignore[assignment]
    ranks._GRACE_S = 2.0
    code, message = execute(folder)
    print(message, file=sys.stderr)
    sys.exit(code)


def lead_to_end(before: Callable[[], None], folder: Path) -> tuple[int | None, str]:
    (code,) = finish(start(lead, before, folder, daemon=False))
    return code, ledger.last_message(folder)


def nothing() -> None:
    pass


def at_step(number: int, action: Callable[[Any], None]) -> None:
    """`action(module)` before the micro-batches of that optimizer step."""
    from morebench.training.module import StageModule

    training_step = StageModule.training_step

    def acting_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if self.next_step == number:
            action(self)
        return training_step(self, batch, batch_idx)

    StageModule.training_step = acting_step  # type: ignore[method-assign]


def is_rank(number: int) -> bool:
    return os.environ["LOCAL_RANK"] == str(number)


def leader() -> int:
    process = parent_process()
    assert process is not None
    assert process.pid is not None
    return process.pid


def kill_rank_1() -> None:
    at_step(3, lambda module: os.kill(os.getpid(), signal.SIGKILL) if is_rank(1) else None)


class KillLeader:
    """In rank 1, once both ranks have left their process ids in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        at_step(3, self.kill)

    def kill(self, module: Any) -> None:
        (self.folder / f".pid{os.environ['LOCAL_RANK']}").write_text(str(os.getpid()))
        while len(list(self.folder.glob(".pid*"))) < 2:
            time.sleep(0.01)
        if is_rank(1):
            os.kill(leader(), signal.SIGKILL)
        time.sleep(60)


def term_to_leader() -> None:
    def ask(module: Any) -> None:
        if is_rank(1):
            os.kill(leader(), signal.SIGTERM)
        while not module.tell().stop:  # handed to every rank
            time.sleep(0.01)

    at_step(3, ask)


def fail_differently() -> None:
    """A bad record on rank 1 alone; rank 0 meets what follows from it."""
    from morebench.errors import DataError

    def fail(module: Any) -> None:
        if is_rank(1):
            raise DataError("record 7 is bad")

    at_step(1, fail)


def check_continues(folder: Path, whole: Path) -> None:
    assert ledger.state(folder) is State.interrupted or ledger.state(folder) is State.failed
    assert lead_to_end(nothing, folder) == (EXIT_DONE, "")
    check_same(folder, whole)


def check_same(folder: Path, whole: Path) -> None:
    assert ledger.is_done(folder)
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
    assert json.loads((folder / "manifest.json").read_text())["world_size"] == 2
    found, expected = (load_file(place / "projector.safetensors") for place in (folder, whole))
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm()  # Adam enlarges a tiny gradient's rounding


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one_run_and_a_killed_one_ends_it(
    config: Config, whole: Path, tmp_path: Path, strategy: Strategy
) -> None:
    folder = planned(tmp_path / "run", config, devices=2, strategy=strategy)
    code, message = lead_to_end(kill_rank_1, folder)
    assert code == EXIT_FAILED
    assert message == f"rank 1: its process died (signal SIGKILL); see {folder / 'log.txt'}"
    check_continues(folder, whole)


def test_a_signal_to_the_leader_reaches_every_rank(config: Config, whole: Path, tmp_path: Path) -> None:
    folder = planned(tmp_path / "run", config, devices=2)
    code, message = lead_to_end(term_to_leader, folder)
    assert code == EXIT_INTERRUPTED
    assert "SIGTERM" in message or "continue" in message
    assert len(metrics(folder)) == 4
    check_continues(folder, whole)


def test_nobody_outlives_a_killed_leader(config: Config, whole: Path, tmp_path: Path) -> None:
    folder = planned(tmp_path / "run", config, devices=2)
    assert finish(start(lead, KillLeader(folder), folder, daemon=False)) == [-signal.SIGKILL]
    pids = [int(path.read_text()) for path in folder.glob(".pid*")]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.02)
    for path in folder.glob(".pid*"):
        path.unlink()
    check_continues(folder, whole)


def test_the_cause_is_told_and_not_what_followed(config: Config, tmp_path: Path) -> None:
    folder = planned(tmp_path / "run", config, devices=2)
    assert lead_to_end(fail_differently, folder) == (EXIT_USER, "rank 1: record 7 is bad")


class SeeNoCheckpoint:
    """Rank 1 sees other files than rank 0; each says that it raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        from morebench.training import run

        check, newest = run._check_same_start, run.newest_checkpoint

        def noted(*arguments: Any) -> None:
            try:
                check(*arguments)
            except RunError:
                (self.folder / f".raised{os.environ['LOCAL_RANK']}").touch()
                raise

        run._check_same_start = noted
        run.newest_checkpoint = lambda *found: None if is_rank(1) else newest(*found)


def test_ranks_that_see_different_checkpoints_all_say_so(config: Config, whole: Path, tmp_path: Path) -> None:
    folder = planned(tmp_path / "run", config, devices=2)
    assert lead_to_end(term_to_leader, folder)[0] == EXIT_INTERRUPTED
    code, message = lead_to_end(SeeNoCheckpoint(folder), folder)
    assert code == RunError.exit_code
    assert "Rank 1 found a whole checkpoint of 0 optimizer steps, rank 0 one of 4." in message
    raised = sorted(folder.glob(".raised*"))
    assert [path.name for path in raised] == [".raised0", ".raised1"]
    for path in raised:
        path.unlink()
    check_continues(folder, whole)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((EXIT_DONE, EXIT_DONE), None),
        ((EXIT_FAILED, EXIT_USER), EXIT_USER),
        ((EXIT_DISK_FULL, EXIT_FAILED), EXIT_DISK_FULL),
        ((EXIT_NAN, EXIT_DISK_FULL), EXIT_NAN),
        ((EXIT_FAILED, EXIT_INTERRUPTED), EXIT_INTERRUPTED),
        ((EXIT_DONE, EXIT_FAILED), EXIT_FAILED),
    ],
)
def test_the_most_telling_rank_speaks_for_all(codes: tuple[int, ...], expected: int | None) -> None:
    ends = [End(rank, code, f"said {code}", said=True) for rank, code in enumerate(codes)]
    if expected is None:
        ranks._raise_worst(ends)
        return
    with pytest.raises((RankError, Interrupted), match=f"said {expected}") as caught:
        ranks._raise_worst(ends)
    assert caught.value.exit_code == expected


def test_lines_of_a_rank_carry_its_number() -> None:
    stream = StringIO()
    tagged = ranks._Tagged(stream, "rank 3 | ")
    print("one\ntwo", file=tagged)
    print("thr", end="", file=tagged)
    assert stream.getvalue() == "rank 3 | one\nrank 3 | two\n"
    print("ee", file=tagged)
    assert stream.getvalue().endswith("rank 3 | three\n")


def test_steps_side_by_side_share_the_cores_by_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("morebench.matrix.launch.usable_cores", lambda: 16)
    for devices, threads, jobs in [(1, 1, 16), (2, 2, 4), (8, 4, 1), ("auto", 4, 4)]:
        assert default_jobs(with_trainer(config, devices=devices, threads=threads).trainer) == jobs
    assert ranks._environment(config.trainer, 2)["OMP_NUM_THREADS"] == "1"
    shared = ranks._environment(with_trainer(config, threads=None).trainer, 2)
    assert int(shared["OMP_NUM_THREADS"]) == max(1, usable_cores() // 2)


def test_srun_starts_its_own_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    four = with_trainer(config, devices=4).trainer
    assert local_ranks(four) == 4
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert local_ranks(four) == 1


def as_another_user(folder: Path) -> None:
    from morebench import prepare, show  # noqa: F401
    from morebench.config.assemble import assemble
    from morebench.config.experiments import expand
    from morebench.matrix import launch as _  # noqa: F401
    from morebench.train import launch

    cell = ["experiments=digits", "llm=llama_tiny", "vision=clip_tiny"]
    composed = assemble(expand([*cell, f"paths.root={folder}", f"paths.runs={folder}/runs"]))
    os.setuid(65534)  # modes do not keep root out
    with pytest.raises(RunError, match=r"/runs cannot be written \(Permission denied\).*paths\.runs=FOLDER"):
        launch(composed, {})


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_named_before_anything_is_built() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own temporary folders are closed to others
    try:
        folder.chmod(0o755)
        assert finish(start(as_another_user, folder)) == [0]
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(folder)


def test_a_file_that_may_not_be_written_is_no_reason_to_retry() -> None:
    for number, code in [(errno.EACCES, EXIT_USER), (errno.EROFS, EXIT_USER), (errno.EDQUOT, EXIT_DISK_FULL)]:
        assert outcome_of(OSError(number, "no", "cache/index"))[0] == code
    assert outcome_of(OSError(errno.EIO, "broken"))[0] == EXIT_FAILED
