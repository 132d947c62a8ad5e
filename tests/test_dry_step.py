"""The largest micro-batch runs before the first step, with the memory of a later one, and leaves no trace."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_recipe, with_trainer
from torch import nn
from training_processes import run_ranks, train_step

from morebench.config.schema import Config, Step
from morebench.data.batch import Batch
from morebench.errors import EXIT_USER, Interrupted, RunError
from morebench.models.mllm import MLLM
from morebench.training.dry_step import DryStep
from morebench.training.module import StageModule
from morebench.training.run import train
from morebench.training.stage import make_stage
from morebench.training.telemetry import MetricsFile

BUDGET = 300  # tokens: several micro-batches an optimizer step


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return with_trainer(make_cell(tmp_path_factory.mktemp("cell")), micro_batch_tokens=BUDGET)


@pytest.fixture(scope="module")
def pretrained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    train(config, Step.pretrain, folder, {})
    return folder


def without_dry_step() -> None:
    DryStep.on_train_start = lambda self, trainer, pl_module: None  # type: ignore[method-assign]


def around(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any, StageModule], Any]) -> list[Any]:
    """What `look(trainer, module)` sees before and after the dry step."""
    seen: list[Any] = []
    dry_step = DryStep.on_train_start

    def watched(self: DryStep, trainer: Any, pl_module: Any) -> None:
        seen.append(look(trainer, pl_module))
        dry_step(self, trainer, pl_module)
        seen.append(look(trainer, pl_module))

    monkeypatch.setattr(DryStep, "on_train_start", watched)
    return seen


def test_numbers_are_the_same_without_it(
    config: Config, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {Step.pretrain: pretrained}
    train(config, Step.finetune, tmp_path / "with", parents)
    with monkeypatch.context() as patch:
        patch.setattr(DryStep, "on_train_start", lambda self, trainer, pl_module: None)
        train(config, Step.finetune, tmp_path / "without", parents)
    same = ("loss", "grad_norm", "tokens", "supervised_tokens", "padding", "step", "lr")
    lines = [
        [[line[key] for key in same] for line in metrics(tmp_path / name)] for name in ("with", "without")
    ]
    assert lines[0] == lines[1]
    for part in ("projector", "llm"):
        one, other = (tmp_path / name / f"{part}.safetensors" for name in ("with", "without"))
        assert one.read_bytes() == other.read_bytes()


def test_two_ranks_compute_the_same_without_it(config: Config, tmp_path: Path) -> None:
    two = with_trainer(config, devices=2)
    for name, function in (("with", train_step), ("without", _train_without)):
        assert run_ranks(2, function, two, Step.pretrain, tmp_path / name, {}) == [0, 0]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    one, other = (tmp_path / name / "projector.safetensors" for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()


def _train_without(*arguments: Any) -> None:
    without_dry_step()
    train_step(*arguments)


def test_it_leaves_no_trace(
    config: Config, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MLLM.forward

    def drawing(self: MLLM, batch: Batch) -> torch.Tensor:
        torch.rand(3)  # as dropout would
        return forward(self, batch)

    def look(trainer: Any, module: StageModule) -> Any:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        gradients = [value.grad for value in module.parameters()]
        rest = [len(trainer.optimizers[0].state), module.next_step, len(module._seen)]
        return {**state, **buffers, "random": torch.get_rng_state()}, gradients, rest

    monkeypatch.setattr(MLLM, "forward", drawing)
    seen = around(monkeypatch, look)
    train(with_recipe(config, max_steps=1), Step.finetune, tmp_path, {Step.pretrain: pretrained})
    before, after = seen
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_it_takes_the_largest_of_all(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Batch] = []
    monkeypatch.setattr(DryStep, "_try", lambda self, trainer, module, batch: taken.append(batch) or True)
    train(config, Step.pretrain, tmp_path, {})
    stage = make_stage(config, Step.pretrain, {})
    memory, plan = stage.memory(), stage.plan(1, stage.micro_batches(1, BUDGET))
    dataset = stage.dataset(plan, 0)
    bytes_ = [int(memory[dataset[item].sample_ids.numpy()].sum()) for item in range(len(dataset))]
    assert len(set(bytes_)) > 5
    assert memory[taken[0].sample_ids.numpy()].sum() == max(bytes_)


@pytest.mark.parametrize(("budget", "copies"), [(100_000, 2), (BUDGET, 3)])
def test_memory_of_a_later_step_is_held(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, copies: int
) -> None:
    """Two moments, and in an accumulation the gradients; a resumed optimizer has the moments already."""
    config = with_trainer(config, micro_batch_tokens=budget, checkpoint_every_n_steps=1)
    live: list[int] = []
    shape = make_stage(config, Step.pretrain, {}).mllm.projector.get_parameter("0.weight").shape
    forward = MLLM.forward

    def counting(self: MLLM, batch: Batch) -> torch.Tensor:
        live.append(_live(shape))
        return forward(self, batch)

    around(monkeypatch, lambda trainer, module: live.append(_live(shape)))
    monkeypatch.setattr(MLLM, "forward", counting)
    append = MetricsFile.append

    def asking_append(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "append", asking_append)
    for added in (copies, copies - 2):
        live.clear()
        with pytest.raises(Interrupted):
            train(config, Step.pretrain, tmp_path, {})
        before, during, after = live[:3]
        assert during - before == added
        assert after == before


def _live(shape: torch.Size) -> int:
    """Number of tensors of this shape."""
    gc.collect()
    return sum(type(one) in (torch.Tensor, nn.Parameter) and one.shape == shape for one in gc.get_objects())


def test_out_of_memory_says_what_to_do(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLLM, "forward", _out_of_memory)
    expected = (
        r"pretrain: the largest micro-batch of the stage \(\d+ tokens, \d+ images, \d+ supervised tokens\) "
        r"does not fit into the memory of this cpu .* Set trainer\.micro_batch_tokens=150 \(it is 300\)"
    )
    with pytest.raises(RunError, match=expected):
        train(config, Step.pretrain, tmp_path, {})
    assert metrics(tmp_path) == []


def test_a_single_sample_cannot_be_split(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLLM, "forward", _out_of_memory)
    with pytest.raises(RunError, match=r"It is a single sample, which no trainer\.micro_batch_tokens splits"):
        train(with_trainer(config, micro_batch_tokens=1), Step.pretrain, tmp_path, {})


def test_out_of_memory_of_one_rank_ends_both(config: Config, tmp_path: Path) -> None:
    two = with_trainer(config, devices=2)
    assert run_ranks(2, _rank_1_is_small, two, Step.pretrain, tmp_path, {}) == [EXIT_USER, EXIT_USER]


def _rank_1_is_small(*arguments: Any) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        MLLM.forward = _out_of_memory  # type: ignore[method-assign]
    train_step(*arguments)


def _out_of_memory(self: MLLM, batch: Batch) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")
