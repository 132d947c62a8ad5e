"""What metrics.jsonl and the manifest say about speed and cost; validation is in test_validation.py."""

import ctypes
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import VISION_SHAPE, make_cell, metrics, with_recipe, with_trainer
from training_processes import finish, run_ranks, start, train_step, train_until_fsync, train_until_line

from morebench.config.schema import Config, Part, Step
from morebench.matrix.mirror_source import MetricsTail, result_metrics
from morebench.training import clock, fit
from morebench.training.clock import StepClock
from morebench.training.energy import EnergyMeter, _Counter
from morebench.training.run import train
from morebench.training.spent import Spent
from morebench.training.stage import make_stage
from morebench.training.telemetry import device_peak


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return with_trainer(make_cell(tmp_path_factory.mktemp("cell")), micro_batch_tokens=300)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(config, Step.pretrain, folder, {})
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_flops_of_a_step_are_those_of_its_samples(config: Config, whole: Path) -> None:
    """By hand, from the sizes in factories_training."""
    stage = make_stage(config, Step.pretrain, {})
    body = 2 * (2 * 32 * 8 * (4 + 2) + 3 * 32 * 48)
    vision = 2 * (2 * (4 * 16 * 16 + 2 * 16 * 32) * 10 + 4 * 10 * 10 * 16) + 2 * 3 * 8 * 8 * 16 * 9
    assert VISION_SHAPE["blocks"] == 3  # of which the last is not built
    vocab = stage.mllm.llm.config.vocab_size
    projector = 9 * (4 * 16 * 32 + 6 * 32 * 32)
    plan = stage.plan(2, 3)  # how the batch is dealt changes nothing
    for line in metrics(whole):
        expected = 0
        for number in plan.global_batch(line["step"]).tolist():
            sample = stage.data.samples[number]
            encoded = stage.chat.encode(sample, stage.tokenizer, 9, 400)
            length, supervised = len(encoded.input_ids), int(encoded.supervised[1:].sum())
            expected += 4 * body * length + 6 * 2 * 32 * length**2 + 4 * 32 * vocab * supervised
            expected += len(sample.images) * (projector + vision)
        assert line["flops"] == expected
        assert line["tflops"] == pytest.approx(expected / line["step_s"] / 1e12, rel=1e-3)


def test_manifest_has_the_sums_of_the_lines(whole: Path) -> None:
    manifest, lines = manifest_of(whole), metrics(whole)
    found = manifest["training"]
    seconds = sum(line["step_s"] for line in lines)
    assert found["steps"] == len(lines)
    for key in ("tokens", "supervised_tokens", "flops"):
        assert found[key] == sum(line[key] for line in lines)
    assert manifest["planned_flops"] == found["flops"]
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / seconds, rel=1e-3)
    assert found["data_wait_share"] == pytest.approx(
        sum(line["data_wait_s"] for line in lines) / seconds, abs=1e-3
    )
    assert found["peak_memory_gib"] == max(line["peak_memory_gib"] for line in lines) > 0.01
    # what nobody told is null and not 0
    assert (found["mfu"], found["validation_loss"]) == (None, None)
    assert (manifest["gpu_hours"], manifest["energy_kwh"]) == (None, None)
    assert manifest["seconds"] >= lines[-1]["seconds"] > seconds


def test_times_are_parts_of_the_step(whole: Path) -> None:
    for line in metrics(whole):
        parts = [line[key] for key in ("data_wait_s", "forward_s", "backward_s", "optimizer_s")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= line["step_s"] + 1e-5


def test_mfu_is_there_where_the_peak_is_known(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert device_peak(torch.device("cpu")) is None
    monkeypatch.setattr(fit, "device_peak", lambda device: 1e-3)
    train(with_recipe(config, max_steps=2), Step.pretrain, tmp_path, {})
    for line in metrics(tmp_path):
        assert line["mfu"] == pytest.approx(line["flops"] / line["step_s"] / 1e9, abs=1e-4)
    assert ", MFU " in capfd.readouterr().err.splitlines()[-1]
    found = manifest_of(tmp_path)["training"]
    assert min(line["mfu"] for line in metrics(tmp_path)) <= found["mfu_median"]
    assert found["mfu"] == pytest.approx(found["flops"] / found["step_seconds"] / 1e9, rel=1e-2)


def test_two_ranks_tell_of_both(config: Config, whole: Path, tmp_path: Path) -> None:
    """Rank 1 waits for its data and takes most memory; rank 0 writes the line."""
    two = with_trainer(config, devices=2)
    assert run_ranks(2, _slow_rank_1, two, tmp_path) == [0, 0]
    for one, line in zip(metrics(whole), metrics(tmp_path), strict=True):
        assert line.keys() == one.keys()
        assert [line[key] for key in ("flops", "tokens")] == [one[key] for key in ("flops", "tokens")]
        assert line["tflops"] == pytest.approx(line["flops"] / line["step_s"] / 2 / 1e12, rel=1e-3)
        assert line["data_wait_s"] >= 0.05
        assert line["peak_memory_gib"] == 300


def _slow_rank_1(config: Config, folder: Path) -> None:
    from morebench.data.datamodule import MicroBatches

    if os.environ["LOCAL_RANK"] == "1":
        read = MicroBatches.__getitem__

        def slow_read(self: MicroBatches, item: int) -> Any:
            time.sleep(0.05)
            return read(self, item)

        MicroBatches.__getitem__ = slow_read  # type: ignore[method-assign]
        StepClock.peak_memory = lambda self: 300 * 2**30  # type: ignore[method-assign]
    train_step(config, Step.pretrain, folder, {})


def test_costs_add_up_over_killed_starts_and_sums_count_a_step_once(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    assert finish(start(train_until_line, 3, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    lost = whole_lines(tmp_path)[-1]
    assert lost["step"] == 2  # after the checkpoint of two steps: it is done again
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    lost["seconds"] += 1000
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps(lost), '{"step": ']))
    # the next start dies when it has cut the lines that told what was spent
    assert finish(start(train_until_fsync, 4, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    train(config, Step.pretrain, tmp_path, {})
    lines, manifest = metrics(tmp_path), manifest_of(tmp_path)
    assert lines[2]["seconds"] > lost["seconds"]
    assert lines[1]["seconds"] < 1000
    assert manifest["seconds"] >= lines[-1]["seconds"]
    sums = manifest_of(whole)["training"]
    for key in ("steps", "tokens", "supervised_tokens", "flops"):
        assert manifest["training"][key] == sums[key]


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_spending_adds_up_and_what_is_partly_unknown_is_unknown() -> None:
    one = Spent().and_then(1800, 4, 7.2e6)
    assert one == Spent(1800, 2.0, 2.0)
    assert one.and_then(3600, 8, 3.6e6) == Spent(5400, 10.0, 3.0)
    assert one.and_then(3600, 8, math.nan) == Spent(5400, 10.0, None)
    assert one.and_then(3600, 8, math.nan).and_then(1, 8, 3.6e6).energy_kwh is None
    assert Spent().and_then(60, 0, math.nan) == Spent(60, None, None)


class Nvml:
    """The driver's library, as far as we use it."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.millijoules, self.uuid = code, 5_000_000, b""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        self.uuid = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = self.millijoules
        return self.code


def test_energy_is_what_the_drivers_counter_went_up_by(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    facts = type("Facts", (), {"uuid": "12-34"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr("morebench.training.energy._SECONDS_BETWEEN_READINGS", 0.0)
    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    meter = EnergyMeter(gpu)
    assert nvml.uuid == b"GPU-12-34"
    nvml.millijoules += 2500
    assert meter.joules() == 2.5
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(code=3))  # not supported
    assert math.isnan(EnergyMeter(gpu).joules())

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert math.isnan(_Counter(gpu).joules())
    assert math.isnan(EnergyMeter(torch.device("cpu")).joules())


class Event:
    """A GPU's clock that goes on by a second with every event."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, other: "Event") -> float:
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_the_optimizer_is_told_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event has not happened when the line is written, and is not waited for."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(clock, "EnergyMeter", lambda device: None)
    ours = StepClock()
    ours.start(torch.device("cuda", 0))
    timings = []
    for _ in range(2):
        ours.step_begins()
        for _ in range(3):
            ours.batch_begins()
            ours.backward_begins()
            ours.backward_ends()
            ours.batch_ends()
        timings.append(ours.step_ends())
    assert [(one.forward, one.backward) for one in timings] == [(3.0, 3.0)] * 2
    assert [one.optimizer for one in timings] == [None, 1.0]


def test_everything_arrives_in_mlflow(whole: Path) -> None:
    points = [(point.key, point.step) for point in MetricsTail(whole).new_points()]
    told = {"loss", "tokens_per_s", "tflops", "forward_s", "peak_memory_gib", "padding", "seconds"}
    assert {(f"train/{key}", step) for key in told for step in range(6)} <= set(points)
    assert "train/mfu" not in dict(points)  # null on a CPU
    found, manifest = result_metrics(whole), manifest_of(whole)
    assert found["run/tokens_per_s_median"] == manifest["training"]["tokens_per_s_median"]
    assert found["run/seconds"] == manifest["seconds"]
    assert "run/mfu" not in found


def test_an_encoder_that_does_not_run_is_not_counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(config, Step.pretrain, {})
    assert stage.flops is stage.costs
    cached = make_stage(config, Step.pretrain, {})
    monkeypatch.setitem(cached.__dict__, "features", object())
    vision = 2 * (2 * (4 * 16 * 16 + 2 * 16 * 32) * 10 + 4 * 10 * 10 * 16) + 2 * 3 * 8 * 8 * 16 * 9
    assert (stage.costs - cached.flops == vision * stage.index.num_images).all()
    assert Part.vision not in stage.recipe.trainable
