"""An older copy of a run that lived on may not commit; SLURM's later start of the same job takes over."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from factories_training import make_cell, metrics

from morebench.config.compose import save_config
from morebench.config.schema import Config
from morebench.errors import EXIT_DONE, EXIT_USER, FencedError, RunError
from morebench.matrix import ledger
from morebench.matrix.ledger import State
from morebench.matrix.step import execute
from morebench.training import run, writing
from morebench.training.telemetry import MetricsFile

SLURM = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    """As the launcher prepares it."""
    save_config(config, tmp_path / "config.yaml")
    for name, content in (
        ("manifest", {"step": "pretrain"}),
        ("cell", {"llm": "gemma2_tiny"}),
        ("parents", {}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def take_over(folder: Path) -> None:
    holder = ledger.owner(folder)
    assert holder is not None
    (folder / ledger.LOCK).write_text(json.dumps(asdict(replace(holder, host="elsewhere", token="theirs"))))


@pytest.mark.parametrize("moment", ["in a step", "before a checkpoint is renamed", "before the parts"])
def test_a_run_that_was_taken_over_commits_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        def taken_over(*arguments: Any, **named: Any) -> Any:
            take_over(folder)
            return function(*arguments, **named)

        return taken_over

    if moment == "in a step":
        monkeypatch.setattr(MetricsFile, "append", first(MetricsFile.append))
    elif moment == "before a checkpoint is renamed":
        monkeypatch.setattr(writing, "layouts_of", first(writing.layouts_of))
    else:
        monkeypatch.setattr(run, "save_parts", first(run.save_parts))
    code, message = execute(folder)
    assert code == EXIT_USER  # nobody starts this copy again
    assert "was taken from this process" in message
    assert "process" in message
    assert "on elsewhere" in message
    checkpoints = [path.name for path in (folder / "checkpoints").glob("*")]
    assert checkpoints == ([] if moment != "before the parts" else checkpoints)
    assert "parts" not in json.loads((folder / "manifest.json").read_text())
    assert not (folder / ledger.DONE).exists()
    assert [set(line) for line in ledger.attempts(folder)] == [{"attempt", "host", "pid", "begun"}]
    holder = ledger.owner(folder)
    assert holder is not None
    assert holder.token == "theirs"


def test_a_run_that_keeps_its_lock_is_done(folder: Path) -> None:
    assert execute(folder) == (EXIT_DONE, "")
    assert ledger.state(folder) is State.done
    assert len(metrics(folder)) == 6


def test_the_fence_names_who_has_the_run_now(tmp_path: Path) -> None:
    with ledger.locked(tmp_path) as me:
        ledger.check_owner(tmp_path, me)
        (tmp_path / ledger.LOCK).unlink()
        with pytest.raises(FencedError, match="held by nobody"):
            ledger.check_owner(tmp_path, me)


def test_a_requeued_job_takes_over_what_its_earlier_start_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node was lost: its process counts as alive for ever."""
    slurm(monkeypatch, "33", "1")
    earlier = replace(ledger.Owner.this_process(), host="lost-node")
    (tmp_path / ledger.LOCK).write_text(json.dumps(asdict(earlier)))
    assert ledger.state(tmp_path) is State.running
    for job, restarts in (("33", "1"), ("33", "0"), ("34", "2"), (None, None)):
        slurm(monkeypatch, job, restarts)
        with pytest.raises(RunError, match="on lost-node"), ledger.locked(tmp_path):
            pass
    slurm(monkeypatch, "33", "2")
    with ledger.locked(tmp_path) as me:
        assert ledger.owner(tmp_path) == me
        with pytest.raises(FencedError):
            ledger.check_owner(tmp_path, earlier)


def slurm(patch: pytest.MonkeyPatch, *values: str | None) -> None:
    for name, value in zip(SLURM, (*values, "test"), strict=True):
        if value is None:
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, value)
