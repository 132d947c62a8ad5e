"""DeepSpeed's ZeRO-2 and ZeRO-3 in Lightning's loop. Imports nothing of DeepSpeed before a run needs it."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn
from torch.optim import Optimizer

from morebench.config.schema import Precision, Strategy
from morebench.errors import ConfigError

# Smaller parameters (norms, biases) are kept whole between steps: gathering them would take longer than
# computing with them. Elements.
PERSISTENT = 100_000
# Gradients are reduced in buckets of so many elements; 800 MB in fp32.
_BUCKET = 200_000_000
_FROZEN_ENCODER = ("normalise", "vision")  # those of the MLLM's modules that run for images only


def check_installed(strategy: Strategy) -> None:
    """Raises ConfigError."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"trainer.strategy={strategy.name} needs the package deepspeed, which is not installed. Install "
            "it with: DS_BUILD_OPS=0 pip install 'morebench[deepspeed]'. Or choose trainer=fsdp2."
        )


class ZeroPrecision(DeepSpeedPrecision):
    """What Lightning's does for DeepSpeed, but for two things: batches keep their fp32 numbers, and the
    hooks before an optimizer step run before optimizer steps only, not at every micro-batch.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        closure()
        strategy, engine = model.trainer.strategy, _untyped(model.trainer.model)
        assert isinstance(strategy, ZeroStrategy)
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
            if strategy.leaves_out:
                strategy.leaves_out = False
                engine.micro_steps += 1
                return None
        with encoder_hidden(model):
            return engine.step(**kwargs)  # it counts micro-batches too


class ZeroStrategy(DeepSpeedStrategy):
    """`stage` 2 shards gradients and optimizer state, 3 the parameters too.

    Under bf16 the parameters that compute are bf16, with fp32 masters in the optimizer; gradients are added
    up and sent in fp32.
    """

    def __init__(self, stage: int, precision: Precision, timeout: timedelta | None) -> None:
        super().__init__(config=_settings(stage, precision), timeout=timeout)
        self.stage = stage
        self.leaves_out = False  # the optimizer step at hand
        self.when_set_up: Callable[[], None] | None = None  # called once the optimizer is DeepSpeed's

    def setup_environment(self) -> None:
        # Lightning's refuses whatever is no GPU, though DeepSpeed runs on the CPU
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        from deepspeed.ops import __compatible_ops__

        # gloo does all; the kernel for shared memory would be compiled at every first use, for half a minute
        __compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        yield  # modules are sharded by Zero.place, not as they are made

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        # Lightning's passes a number of a device that the CPU does not have; without it LOCAL_RANK counts
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[value for value in model.parameters() if value.requires_grad],
            config=self.config,
            dist_init_required=False,
        )
        return engine, wrapped

    def init_deepspeed(self) -> None:
        assert self.lightning_module is not None
        for name in _FROZEN_ENCODER:
            self.lightning_module.get_submodule(f"mllm.{name}").to(self.root_device)
        with encoder_hidden(self.lightning_module):
            super().init_deepspeed()
        if self.when_set_up is not None:
            self.when_set_up()
            self.when_set_up = None


@contextmanager
def encoder_hidden(module: nn.Module) -> Iterator[None]:
    """Out of DeepSpeed's sight, wherever it walks over all parameters. ZeRO-3 would share out the frozen
    encoder too, and gather it in every forward: for nothing, and a rank whose bin has no image would leave
    the others waiting: ZeRO-3 wants the same modules in the same order on every rank.
    """
    mllm = module.get_submodule("mllm")
    children = dict(mllm._modules)
    for name in _FROZEN_ENCODER:
        del mllm._modules[name]
    try:
        yield
    finally:
        mllm._modules.clear()
        mllm._modules.update(children)


def _settings(stage: int, precision: Precision) -> dict[str, Any]:
    shared = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    third = {
        "stage3_param_persistence_threshold": PERSISTENT,
        "memory_efficient_linear": False,  # replaces torch's linear for the whole process
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for its own counters
        "gradient_clipping": 0.0,  # ours comes first
        "zero_allow_untested_optimizer": True,  # torch's AdamW, for the same maths as elsewhere
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": shared | (third if stage == 3 else {}),
        "bf16": {"enabled": precision is Precision.bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _untyped(value: Any) -> Any:
    return value
