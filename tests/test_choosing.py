"""What is chosen once on a machine: from memory, and by measurement."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, with_trainer

from morebench.config.schema import Attention, Config, LossKernel, Step, Strategy
from morebench.data.batch import Batch
from morebench.errors import ConfigError
from morebench.models import room
from morebench.models.loss import loss_kernel_problem
from morebench.models.memory import state_per_rank
from morebench.models.mllm import MLLM
from morebench.models.room import Room
from morebench.training.choices import Choices
from morebench.training.choosing import stage_room, usable
from morebench.training.files import read_manifest
from morebench.training.probe import Probe
from morebench.training.run import train
from morebench.training.stage import Stage, make_stage


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def pretrained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    train(config, Step.pretrain, folder, {})
    return folder


@pytest.fixture(scope="module")
def finetune(config: Config, pretrained: Path) -> Stage:
    return make_stage(config, Step.finetune, {Step.pretrain: pretrained})


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were busy with 200 tokens."""
    for name, tokens in {"MOST_TOKENS": 800, "BUSY_TOKENS": 200, "_LEAST_TOKENS": 50}.items():
        monkeypatch.setattr(room, name, tokens)


def with_asked(stage: Stage, **values: Any) -> Stage:
    return replace(stage, config=with_trainer(stage.config, **values))


def free_for(stage: Stage, tokens: int, recomputed: int) -> int:
    """Bytes of a device into which just this fits."""
    plan = stage.plan(1, stage.micro_batches(1, tokens))
    state = state_per_rank(stage.config, stage.recipe.trainable, Strategy.auto, 1)
    return int((state + plan.loads(stage.memory(recomputed)).max()) / room.SHARE) + 2


def test_first_fewer_tokens_then_recompute_then_still_fewer_tokens(finetune: Stage) -> None:
    stage = with_asked(finetune, micro_batch_tokens=None)
    assert stage_room(stage, 1, free_for(stage, 800, 0)) == Room(800, 0)
    assert stage_room(stage, 1, free_for(stage, 400, 0)) == Room(400, 0)
    blocks = stage.num_blocks
    assert stage_room(stage, 1, free_for(stage, 200, blocks)) == Room(200, blocks)
    assert stage_room(stage, 1, free_for(stage, 200, blocks) - 4).micro_batch_tokens < 200
    assert stage_room(stage, 1, 0) == Room(50, blocks)  # the dry step will say it


def test_what_is_asked_for_is_kept(finetune: Stage) -> None:
    large = free_for(finetune, 800, 0)
    asked = with_asked(finetune, micro_batch_tokens=400)
    blocks = asked.num_blocks
    assert stage_room(asked, 1, large) == Room(400, 0)
    assert stage_room(asked, 1, free_for(finetune, 400, blocks)) == Room(400, blocks)
    assert stage_room(with_asked(asked, recompute=0.5), 1, large) == Room(400, round(blocks / 2))
    assert stage_room(with_asked(finetune, recompute=0.5), 1, None).recomputed == round(blocks / 2)


def test_pretrain_recomputes_nothing(config: Config) -> None:
    stage = make_stage(with_trainer(config, micro_batch_tokens=None, recompute=1.0), Step.pretrain, {})
    assert stage_room(stage, 1, None) == Room(room.CPU_TOKENS, 0)
    assert stage_room(with_asked(stage, recompute=None), 1, 0) == Room(50, 0)


def test_kernels_that_cannot_be_used_are_all_named(finetune: Stage) -> None:
    asked = with_asked(finetune, attention=Attention.varlen, loss_kernel=LossKernel.liger)
    with pytest.raises(ConfigError) as caught:
        usable(asked.config, asked.recipe, "cpu")
    assert "trainer.attention=varlen: it needs a GPU" in str(caught.value)
    assert "trainer.loss_kernel=liger: it needs a GPU" in str(caught.value)
    assert usable(finetune.config, finetune.recipe, "cpu") == (
        [Attention.loop],
        [LossKernel.one_pass, LossKernel.torch],
    )
    for kind, device in ((LossKernel.liger, "cuda"), (LossKernel.one_pass, "cpu")):
        assert "ZeRO-3" in str(loss_kernel_problem(kind, device, torch.float32, Strategy.zero3))
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        problem = loss_kernel_problem(LossKernel.one_pass, device, dtype, Strategy.auto)
        assert problem == "it computes in fp32 on the CPU only: torch"


def test_the_probe_takes_the_fastest_that_works(
    finetune: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(finetune.config, finetune.recipe, [90, 60, 30], [5, 9, 1], torch.device("cpu"))
    seconds = iter([0.002, 0.001, 0.003])
    run = Probe._seconds
    monkeypatch.setattr(Probe, "_seconds", lambda self: run(self) * 0 + next(seconds))
    # flex has no backward pass on the CPU
    kinds = [Attention.loop, Attention.flex]
    assert probe.fastest("attention", kinds, probe.attend_by) is Attention.loop
    assert probe._mllm.attention is Attention.loop
    assert "trainer.attention=loop: loop 2.0 ms, flex failed (" in capsys.readouterr().err
    assert probe.fastest("x", ["b", "c"], lambda choice: None) == "b"


def test_checkpoints_of_before_still_load() -> None:
    machine = {"device": "cpu", "world_size": 1, "micro_batch_tokens": 300, "asked_threads": 1}
    choices = Choices.from_facts({"machine": machine, "micro_batches": 3, "threads": 1})
    assert choices.micro_batch_tokens == 300
    assert (choices.attention, choices.loss_kernel, choices.recomputed) == ("loop", "torch", 0)
    assert Choices.from_facts(choices.facts()) == choices


def test_recompute_changes_no_number(config: Config, pretrained: Path, tmp_path: Path) -> None:
    parents = {Step.pretrain: pretrained}
    for name, share in (("none", 0.0), ("all", 1.0)):
        train(with_trainer(config, recompute=share), Step.finetune, tmp_path / name, parents)
    assert losses(tmp_path / "none") == losses(tmp_path / "all")
    one, other = (tmp_path / name / "llm.safetensors" for name in ("none", "all"))
    assert one.read_bytes() == other.read_bytes()
    assert read_manifest(tmp_path / "all")["recomputed_blocks"] > 0


def test_a_budget_that_was_found_is_halved_until_it_fits(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, most = MLLM.forward, 260

    def small(self: MLLM, batch: Batch) -> torch.Tensor:
        if len(batch.input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(MLLM, "forward", small)
    monkeypatch.setattr(room, "CPU_TOKENS", 1000)
    train(with_trainer(config, micro_batch_tokens=None), Step.pretrain, tmp_path / "found", {})
    manifest = read_manifest(tmp_path / "found")
    assert manifest["micro_batch_tokens"] in (125, 250)
    assert "It came from an estimate: trying half." in capsys.readouterr().err
    assert manifest["anomalies"] == []
    asked = with_trainer(config, micro_batch_tokens=manifest["micro_batch_tokens"])
    train(asked, Step.pretrain, tmp_path / "asked", {})
    assert losses(tmp_path / "found") == losses(tmp_path / "asked")
