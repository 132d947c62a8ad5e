"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo ranks on the CPU: the same maths as one plain rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, with_recipe, with_trainer
from gradients import Case, distance, from_file, ours_to_files, stock
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_processes import run_ranks

from morebench.config.schema import Config, Precision, Step, Strategy
from morebench.data.datamodule import Loader
from morebench.errors import ConfigError
from morebench.training import zero_strategy
from morebench.training.fragments import Fragment
from morebench.training.module import StageModule
from morebench.training.run import train
from morebench.training.sharding_zero import Zero
from morebench.training.signals import StopRequest
from morebench.training.stage import make_stage
from morebench.training.strategy import exact_arithmetic, make_trainer, quiet_libraries, sharding_of

HALF, NUM_STEPS = 3, 6
CASES = [(Strategy.zero2, "gemma2"), (Strategy.zero3, "gemma2"), (Strategy.zero3, "llama")]  # tied, tied, not


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_strategy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zero2 needs .* pip install 'morebench\[deepspeed\]'"):
        zero_strategy.check_installed(Strategy.zero2)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two ranks do under one strategy, and beside it what one plain rank does."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    strategy, family = request.param
    root: Path = tmp_path_factory.mktemp("zero")
    config = make_cell(root / "cell", family)
    train(config, Step.pretrain, root / "pretrained", {})
    loss, gradients = stock(config, root / "pretrained")
    save_file(gradients | {"loss": torch.tensor(loss, dtype=torch.float64)}, root / "stock.safetensors")
    two = with_trainer(config, strategy=strategy, devices=2)
    assert run_ranks(2, _everything, two, root) == [0, 0]
    _run(config, root, "one", root / "whole")
    return root


@pytest.mark.parametrize("micro_batches", [3, 9])
def test_gradients_are_those_of_one_backward(folder: Path, micro_batches: int) -> None:
    """Nine bins a rank: empty ones, and text-only ones beside images on the other rank."""
    expected_loss, expected = from_file(folder / "stock.safetensors")
    for rank in (0, 1):
        loss, gradients = from_file(folder / f"{micro_batches}.rank{rank}.safetensors")
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert distance(gradients, expected) < 1e-5


def test_frozen_llm_and_the_dry_step_before_change_nothing(folder: Path) -> None:
    assert losses(folder / "frozen") == pytest.approx(losses(folder / "pretrained"), rel=1e-5)
    _assert_close(*(load_file(folder / name / "projector.safetensors") for name in ("frozen", "pretrained")))


def test_pieces_cover_every_element_once(folder: Path) -> None:
    counts: dict[str, int] = {}
    for rank in (0, 1):
        for name, (values, _, _) in torch.load(folder / "whole" / f"rank{rank}.pt")["state"].items():
            counts[name] = counts.get(name, 0) + values.numel()
    ends = load_file(folder / "whole" / "end.safetensors")
    expected = {f"{name}/step": 1 for name in ends}
    for key in ("exp_avg", "exp_avg_sq"):
        expected |= {f"{name}/{key}": value.numel() for name, value in ends.items()}
    assert counts == expected


def test_continued_run_is_bit_equal_to_a_whole_one(folder: Path) -> None:
    whole, again = (load_file(folder / name / "losses.safetensors")["losses"] for name in ("whole", "again"))
    assert len(whole) == NUM_STEPS
    assert torch.equal(again, whole[HALF:])
    found, expected = (load_file(folder / name / "end.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_plain_rank_continues_what_two_began(folder: Path) -> None:
    whole, one = (load_file(folder / name / "losses.safetensors")["losses"] for name in ("whole", "one"))
    assert one.tolist() == pytest.approx(whole[HALF:].tolist(), rel=1e-5)
    _assert_close(*(load_file(folder / name / "end.safetensors") for name in ("one", "whole")))


def test_masters_of_bf16_parameters_are_not_rounded(folder: Path) -> None:
    exact, masters = (load_file(folder / name / "begin.safetensors") for name in ("whole", "bf16"))
    assert any(not torch.equal(value, value.bfloat16().float()) for value in exact.values())
    assert all(torch.equal(masters[name], value) for name, value in exact.items())
    loss, expected = (
        load_file(folder / name / "losses.safetensors")["losses"][0] for name in ("bf16", "whole")
    )
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)


def test_step_that_is_left_out_changes_nothing(folder: Path) -> None:
    begin, end = (load_file(folder / "left_out" / f"{name}.safetensors") for name in ("begin", "end"))
    assert all(torch.equal(end[name], value) for name, value in begin.items())
    assert len(load_file(folder / "left_out" / "losses.safetensors")["losses"]) == 2


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm()  # Adam enlarges a tiny gradient's rounding


def _everything(config: Config, root: Path) -> None:
    zero_strategy.PERSISTENT = 0  # or nothing so small would be shared out
    # a few positions at a time
    cases = {str(number): Case(config, number, logits_per_chunk=20_000) for number in (3, 9)}
    ours_to_files(cases, root / "pretrained", root)
    train(
        with_trainer(config, micro_batch_tokens=300, checkpoint_every_n_steps=100),
        Step.pretrain,
        root / "frozen",
        {},
    )
    _run(config, root, "whole", None)
    _run(config, root, "again", root / "whole")
    _run(with_recipe(config, precision=Precision.bf16, max_steps=1), root, "bf16", None)
    Zero.clip = _leave_out  # type: ignore[method-assign]
    _run(with_recipe(config, max_steps=2), root, "left_out", None)


def _leave_out(sharding: Zero, trained: Any, max_norm: float, grad_norm: Tensor) -> None:
    sharding.leave_out(sharding._optimizer, trained)


def _run(config: Config, root: Path, name: str, begun: Path | None) -> None:
    """Finetune, from its first step or from where `begun` was half done."""
    first_step = 0 if begun is None else HALF
    target = root / name
    target.mkdir(exist_ok=True)
    with quiet_libraries(), exact_arithmetic(1):
        trainer = make_trainer(config.trainer, config.stage.finetune)
        stage = make_stage(config, Step.finetune, {Step.pretrain: root / "pretrained"})
        trainer.accumulate_grad_batches = 3
        plan = stage.plan(trainer.world_size, 3)
        module = StageModule(
            stage.mllm.train(),
            stage.recipe,
            num_steps=plan.num_steps,
            first_step=first_step,
            sharding=sharding_of(trainer),
            samples=[],
            stop=StopRequest(),
        )
        trainer.callbacks.append(_Watcher(target, begun))
        trainer.fit(module, Loader(stage.dataset(plan, trainer.global_rank), first_step, 0))
        trained = {key: value for key, value in stage.mllm.named_parameters() if value.requires_grad}
        _save(trainer, dict(module.sharding.gather(trained)), target / "end.safetensors")


class _Watcher(Callback):
    def __init__(self, target: Path, begun: Path | None) -> None:
        self._target = target
        self._begun = begun
        self._losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        trained, sharding = pl_module.trained(), pl_module.sharding
        if self._begun is not None:
            pieces = [_Merged(self._begun, name) for name in ("parameters", "state")]
            sharding.restore(trainer.optimizers[0], trained, *pieces)
        _save(trainer, dict(sharding.gather(trained)), self._target / "begin.safetensors")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, StageModule)
        done = pl_module.next_step
        if hasattr(pl_module, "stats") and len(self._losses) < done - (HALF if self._begun else 0):
            self._losses.append(pl_module.stats.loss)
            values = torch.tensor(self._losses, dtype=torch.float64)
            _save(trainer, {"losses": values}, self._target / "losses.safetensors")
            if done == HALF and self._begun is None:
                trained, sharding = pl_module.trained(), pl_module.sharding
                state = sharding.optimizer_state(trainer.optimizers[0], trained)
                held = {"parameters": sharding.parameters(trained), "state": state}
                plain = {
                    kind: {name: tuple(piece) for name, piece in named.items()}
                    for kind, named in held.items()
                }
                torch.save(plain, self._target / f"rank{trainer.global_rank}.pt")
                trainer.strategy.barrier()


class _Merged:
    """`Pieces` of what two ranks kept."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._wholes: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for rank in (0, 1):
            for name, found in torch.load(folder / f"rank{rank}.pt")[kind].items():
                piece = Fragment(*found)
                self.shapes[name] = piece.shape
                whole = self._wholes.setdefault(
                    name, torch.full((torch.Size(piece.shape).numel(),), torch.nan)
                )
                whole[piece.start : piece.start + piece.values.numel()] = piece.values

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._wholes[name][start:stop]


def _save(trainer: Trainer, tensors: dict[str, Tensor], path: Path) -> None:
    if trainer.is_global_zero:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
