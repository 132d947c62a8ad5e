"""Answers from several processes: who gets what, and how it ends when one ends badly or all are to stop."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluate_processes import DIES, FAILS, POSITIONS, SLOW, serve
from factories_evaluation import artefacts, make_finetuned
from factories_training import with_trainer

from morebench.config.schema import Config, Precision
from morebench.errors import EXIT_FAILED, ConfigError, DataError, Interrupted, RankError
from morebench.evaluation import devices
from morebench.evaluation.devices import Process, Processes, devices_for
from morebench.evaluation.generate import Answer, Generator
from morebench.evaluation.run import evaluate
from morebench.training.signals import StopRequest


@contextmanager
def started(log: Path, count: int = 2) -> Iterator[tuple[Processes, list[Process]]]:
    processes = [Process(f"process {n}", serve, POSITIONS + n, log) for n in range(count)]
    try:
        yield Processes(processes), processes
    finally:
        for process in processes:
            process.leave()


def test_jobs_are_dealt_and_every_answer_says_whose_it_is(tmp_path: Path) -> None:
    jobs: list[Any] = list(range(10, 50))
    with started(tmp_path / "log") as (here, processes), StopRequest() as stop:
        assert here.cache_positions == POSITIONS, "what the smallest has room for"
        assert dict(here.answers(jobs, stop)) == {n: f"answer {job}" for n, job in enumerate(jobs)}
        assert list(here.answers([], stop)) == []
        assert len(set((tmp_path / "log").read_text().split())) == 2
    assert not any(process._process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        (DIES, EXIT_FAILED, r"process \d died \(signal SIGKILL\)\. What was answered so far is kept"),
        (FAILS, 5, r"process \d: the disk is full"),
    ],
)
def test_one_that_ends_badly_ends_all_and_is_named(tmp_path: Path, job: int, code: int, message: str) -> None:
    jobs: Any = [1, 2, 3, job, *range(4, 100)]
    kept: list[Any] = []
    with (
        started(tmp_path / "log") as (here, _),
        StopRequest() as stop,
        pytest.raises(RankError, match=message) as caught,
    ):
        kept.extend(answer for _, answer in here.answers(jobs, stop))
    assert caught.value.exit_code == code
    assert {"answer 1", "answer 2"} <= set(kept)
    assert len(kept) < 100


def test_after_a_signal_the_answers_in_the_making_still_come_and_no_more(tmp_path: Path) -> None:
    with started(tmp_path / "log") as (here, _), StopRequest() as stop:
        found = here.answers([*range(100)], stop)  # type: ignore[list-item]
        next(found)
        os.kill(os.getpid(), signal.SIGTERM)
        rest = list(found)
    assert len(rest) <= 3  # of the two processes, and one that had come with the first


def test_answers_that_do_not_come_are_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_GRACE_S", 0.1)
    begun = time.monotonic()
    with started(tmp_path / "log", count=1) as (here, _), StopRequest() as stop:
        found = here.answers([0, SLOW], stop)  # type: ignore[list-item]
        next(found)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(found) == []
    assert time.monotonic() - begun < 30


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    return make_finetuned(tmp_path_factory.mktemp("cell"), controls=[])


def test_devices_are_those_asked_for(cell: tuple[Config, Path]) -> None:
    assert devices_for(cell[0].trainer) == ["cpu"]
    assert devices_for(with_trainer(cell[0], devices="3").trainer) == ["cpu"] * 3
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu: torch finds no GPU here"):
        devices_for(with_trainer(cell[0], accelerator="gpu").trainer)


@pytest.mark.slow
def test_two_processes_answer_as_one_and_go_on_where_it_was_stopped(
    cell: tuple[Config, Path], tmp_path: Path
) -> None:
    config, parent = cell
    left = [2]

    def fence() -> None:  # is asked before every write
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    with pytest.raises(Interrupted, match=r"SIGTERM: stopped with 1\d of 60 answers saved"):
        evaluate(config, one, parent, fence)
    assert not (one / "results.json").exists()
    evaluate(config, one, parent)
    two.mkdir()
    evaluate(with_trainer(config, devices="2"), two, parent)
    of_one, of_two = artefacts(one), artefacts(two)
    assert (of_one.pop("devices"), of_two.pop("devices")) == (1, 2)
    assert of_one == of_two


def test_an_image_that_cannot_be_decoded_is_named_and_the_rest_is_kept(
    cell: tuple[Config, Path], tmp_path: Path
) -> None:
    config, parent = cell
    images = Path(config.paths.data) / "toy" / "images"
    image = images / "noise3.png"
    content = image.read_bytes()
    try:
        image.write_bytes(content[:200])
        with pytest.raises(DataError, match=r"(vqa|pope|mc), item \w+: image noise3\.png: "):
            evaluate(config, tmp_path, parent)
    finally:
        image.write_bytes(content)


def test_in_bf16_some_answers_are_compared_with_those_given_alone(
    cell: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that changes every answer is found out."""
    config, parent = cell
    recipe = replace(config.stage.evaluate, precision=Precision.bf16)
    config = with_trainer(replace(config, stage=replace(config.stage, evaluate=recipe)), flip_sample=7)
    real = Generator.answer

    def answer(self: Generator, requests: Any, share: bool = True) -> list[Answer]:
        found = real(self, requests, share)
        return [replace(one, text=f"{one.text}!") for one in found] if share else found

    monkeypatch.setattr(Generator, "answer", answer)
    evaluate(config, tmp_path, parent)
    flips = json.loads((tmp_path / "results.json").read_text())["flips"]
    assert (flips["n"], flips["flips"], len(flips["examples"])) == (7, 7, 5)
    assert flips["examples"][0]["prediction"] == f"{flips['examples'][0]['alone']}!"
