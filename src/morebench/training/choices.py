"""What is chosen on the machine once and kept for the rest of a run, so that a resume is bit-exact."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from morebench.config.schema import Attention, Config, Features, LossKernel, Strategy, Trainer


@dataclass(frozen=True)
class Machine:
    """What the choices depend on: the devices, and what the config asks for. Another machine chooses again.

    The defaults are those of checkpoints that do not say.
    """

    device: str  # cpu, cuda
    world_size: int
    micro_batch_tokens: int | None
    asked_threads: int | None
    features: str = Features.computed.name
    device_name: str | None = None
    sharding: str = "replicated"  # or a strategy that shards; it orders sums in its own way
    recompute: float | None = None
    attention: str = Attention.auto.name
    loss_kernel: str = LossKernel.auto.name
    compile: bool | None = None


@dataclass(frozen=True)
class Choices:
    machine: Machine
    micro_batches: int  # K: per rank and optimizer step
    threads: int  # per rank; the order of sums depends on it
    micro_batch_tokens: int
    recomputed: int = 0  # blocks of the LLM
    attention: str = Attention.loop.name
    loss_kernel: str = LossKernel.torch.name
    compile: bool = False

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Choices":
        machine = Machine(**facts["machine"])
        return cls(**{"micro_batch_tokens": machine.micro_batch_tokens, **facts, "machine": machine})


def this_machine(config: Config, device: torch.device, world_size: int) -> Machine:
    trainer = config.trainer
    replicated = trainer.strategy in (Strategy.auto, Strategy.ddp)
    return Machine(
        device=device.type,
        world_size=world_size,
        micro_batch_tokens=trainer.micro_batch_tokens,
        asked_threads=trainer.threads,
        features=config.features.name,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        sharding="replicated" if replicated else trainer.strategy.name,
        recompute=trainer.recompute,
        attention=trainer.attention.name,
        loss_kernel=trainer.loss_kernel.name,
        compile=trainer.compile,
    )


def threads_for(config: Trainer) -> int:
    """torch's own number follows OMP_NUM_THREADS and the cores this process may use."""
    return config.threads or torch.get_num_threads()
