"""What is chosen on the machine once and kept for the rest of a run, so that a resume is bit-exact."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from morebench.config.schema import Config, Features, Strategy, Trainer


@dataclass(frozen=True)
class Machine:
    """What the choices depend on. Another machine chooses again."""

    device: str  # cpu, cuda
    world_size: int
    micro_batch_tokens: int  # as found from memory where the config leaves it open
    asked_threads: int | None
    features: str = Features.computed.name  # checkpoints that do not say computed theirs
    sharding: str = "replicated"  # or a strategy that shards; it orders sums in its own way


@dataclass(frozen=True)
class Choices:
    machine: Machine
    micro_batches: int  # K: per rank and optimizer step
    threads: int  # per rank; the order of sums depends on it

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Choices":
        return cls(**{**facts, "machine": Machine(**facts["machine"])})


def this_machine(config: Config, device: str, world_size: int) -> Machine:
    trainer = config.trainer
    replicated = trainer.strategy in (Strategy.auto, Strategy.ddp)
    return Machine(
        device,
        world_size,
        trainer.micro_batch_tokens or 16384,
        trainer.threads,
        config.features.name,
        "replicated" if replicated else trainer.strategy.name,
    )


def threads_for(config: Trainer) -> int:
    """torch's own number follows OMP_NUM_THREADS and the cores this process may use."""
    return config.threads or torch.get_num_threads()
