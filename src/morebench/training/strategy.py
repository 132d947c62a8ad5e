"""Lightning's Trainer for the machine at hand, and how its strategy shards."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic as determinism
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from transformers.utils import logging as transformers_logging

from morebench.config.schema import Precision, Strategy, Trainer, TrainRecipe
from morebench.errors import ConfigError
from morebench.training.sharding import Replicated, Sharding
from morebench.training.sharding_fsdp import FullySharded
from morebench.training.sharding_zero import Zero
from morebench.training.watchdog import group_timeout
from morebench.training.zero_strategy import ZeroPrecision, ZeroStrategy, check_installed

_PRECISION: dict[Precision, Any] = {Precision.fp32: "32-true", Precision.bf16: "bf16-mixed"}

_ZERO_STAGES = {Strategy.zero2: 2, Strategy.zero3: 3}


def make_trainer(machine: Trainer, recipe: TrainRecipe) -> LightningTrainer:
    """Bare: checkpoints, logs and progress are ours. One epoch: the loader holds the missing steps.

    Raises ConfigError for devices that are not there.
    """
    check_gpu(machine)
    devices = num_devices(machine)
    return LightningTrainer(
        barebones=True,
        accelerator=machine.accelerator,
        devices=devices,
        num_nodes=machine.num_nodes,
        strategy=_strategy(machine, devices * machine.num_nodes, recipe.precision),
        precision=_precision(machine.strategy, recipe.precision),
        max_epochs=1,
        use_distributed_sampler=False,
        plugins=_plugins(machine.strategy, recipe.precision),
    )


def check_gpu(machine: Trainer) -> None:
    """Raises ConfigError for one that is asked for and not there."""
    if machine.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={machine.accelerator}: torch finds no GPU here. Choose trainer=cpu, or "
            f"look at nvidia-smi and CUDA_VISIBLE_DEVICES (torch {torch.__version__})."
        )


def _precision(strategy: Strategy, precision: Precision) -> Any:
    if strategy in _ZERO_STAGES:
        return None  # a plugin's
    # FSDP2 casts the weights itself; autocast would do it again
    return "32-true" if strategy is Strategy.fsdp2 else _PRECISION[precision]


def _plugins(strategy: Strategy, precision: Precision) -> list[Any]:
    found: list[Any] = []
    if SLURMEnvironment.detect():
        # Lightning would requeue on USR1 and raise between two micro-batches
        found.append(SLURMEnvironment(auto_requeue=False))
    if strategy in _ZERO_STAGES:
        found.append(ZeroPrecision(_PRECISION[precision]))
    return found


def _strategy(machine: Trainer, world_size: int, precision: Precision) -> LightningStrategy | str:
    if machine.strategy in _ZERO_STAGES:
        check_installed(machine.strategy)
        return ZeroStrategy(_ZERO_STAGES[machine.strategy], precision, group_timeout(machine))
    if machine.strategy is Strategy.fsdp2:
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, timeout=group_timeout(machine)
        )
    if machine.strategy is Strategy.ddp or (machine.strategy is Strategy.auto and world_size > 1):
        # buffers are constants (rotary tables): broadcasting them each step would only cost
        return DDPStrategy(
            broadcast_buffers=False, gradient_as_bucket_view=True, timeout=group_timeout(machine)
        )
    if machine.strategy is Strategy.auto:
        return "auto"
    raise ConfigError(f"Nothing is known about trainer.strategy={machine.strategy.name}.")


def creates_sharded(machine: Trainer) -> bool:
    """Whether no rank ever holds the whole LLM."""
    return machine.strategy in (Strategy.fsdp2, Strategy.zero3)


def num_devices(machine: Trainer) -> int:
    if machine.devices != "auto":
        return int(machine.devices)
    uses_gpus = machine.accelerator != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if uses_gpus else 1


def connect(trainer: LightningTrainer) -> None:
    """Let ranks talk to each other already; Lightning does so only when it has a module."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):  # its own asks for the module
        assert strategy.accelerator is not None
        strategy.accelerator.setup_device(strategy.root_device)
        strategy._setup_distributed()
    else:
        strategy.setup_environment()


def sharding_of(trainer: LightningTrainer) -> Sharding:
    if isinstance(trainer.strategy, SingleDeviceStrategy):
        return Replicated(trainer, mean_over_ranks=False)
    if isinstance(trainer.strategy, ZeroStrategy):  # before DDP, which it is a kind of
        return Zero(trainer, trainer.strategy)
    if isinstance(trainer.strategy, DDPStrategy):
        return Replicated(trainer, mean_over_ranks=True)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return FullySharded(trainer)
    raise ConfigError(f"Nothing is known about sharding under {type(trainer.strategy).__name__}.")


@contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Sums in a fixed order, on the CPU: bit-equal results need equal threads and deterministic kernels."""
    former_threads, former_mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    former_fill = determinism.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        determinism.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check for bugs, not for results
    try:
        yield
    finally:
        torch.set_num_threads(former_threads)
        torch.use_deterministic_algorithms(former_mode)
        determinism.fill_uninitialized_memory = former_fill  # type: ignore[attr-defined]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """On a GPU, what a bf16 recipe still multiplies in fp32 may use TF32; an fp32 recipe means fp32."""
    former = torch.get_float32_matmul_precision()
    tf32 = torch.cuda.is_available() and precision is Precision.bf16
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep banners, tips and advice about features that we replace out of the logs; errors still show."""
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
