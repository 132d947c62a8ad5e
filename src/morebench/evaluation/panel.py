"""Finished runs that are asked the same questions."""

import gc
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from morebench.config.schema import Config, Precision, Strategy, Trainer
from morebench.errors import ConfigError, RunError
from morebench.evaluation.conversation import Conversation
from morebench.evaluation.model import LoadedModel, load_model
from morebench.models.memory import state_per_rank
from morebench.training.choices import threads_for
from morebench.training.strategy import exact_arithmetic

_WEIGHTS_SHARE = 0.7  # of a GPU's free memory; the rest is for caches and activations


@dataclass(frozen=True)
class Member:
    label: str
    config: Config
    folder: Path  # of the finetune run


class Panel:
    """Every model stays loaded where the device holds them all; otherwise the one that was asked last."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members = tuple(members)
        self._device = device
        self._loaded: dict[int, LoadedModel] = {}
        self.holds_all = device.type == "cpu" or len(self.members) == 1 or self._fit()

    def ask(self, number: int, conversation: Conversation, question: str) -> Generator[str, None, None]:
        """As `Conversation.ask`. Raises WeightsError, and RunError where the device is too small."""
        member = self.members[number]
        with exact_arithmetic(threads_for(member.config.trainer)):
            model = self.load(number)
            with _room_for(f"{member.label}'s answer", self._device):
                yield from conversation.ask(model, question)

    def load(self, number: int) -> LoadedModel:
        if number not in self._loaded:
            if not self.holds_all:
                self._loaded.clear()
                gc.collect()
                torch.cuda.empty_cache()
            member = self.members[number]
            with _room_for(f"{member.label}'s weights", self._device):
                self._loaded[number] = load_model(member.config, member.folder, self._device)
        return self._loaded[number]

    def _fit(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        return sum(map(_weight_bytes, self.members)) <= _WEIGHTS_SHARE * free


def _weight_bytes(member: Member) -> int:
    in_bf16 = state_per_rank(member.config, (), Strategy.auto, 1)
    return in_bf16 * (2 if member.config.stage.evaluate.precision is Precision.fp32 else 1)


@contextmanager
def _room_for(what: str, device: torch.device) -> Iterator[None]:
    """Raises RunError in place of torch's error."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        remedy = (
            "Free some of it, choose another GPU with CUDA_VISIBLE_DEVICES, or trainer=cpu."
            if device.type == "cuda"
            else "Close other programs, or set stage.evaluate.precision=bf16."
        )
        raise RunError(
            f"The memory of this machine's {device.type} is too small for {what}. {remedy}"
        ) from error


def device_of(trainer: Trainer) -> torch.device:
    """Raises ConfigError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if trainer.accelerator in ("gpu", "cuda") and not has_gpu:
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}: torch finds no GPU here. Choose trainer=cpu, or "
            f"look at nvidia-smi and CUDA_VISIBLE_DEVICES (torch {torch.__version__})."
        )
    return torch.device("cuda" if has_gpu and trainer.accelerator != "cpu" else "cpu")
