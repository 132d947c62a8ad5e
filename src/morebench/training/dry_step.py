"""The largest micro-batch of a stage, run once before the first step: what does not fit shows at once."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from morebench.data.batch import Batch
from morebench.errors import RunError
from morebench.training.module import StageModule
from morebench.training.sharding_zero import Zero

GIB = 2**30


class TooLargeError(RunError):
    def __init__(self, message: str, num_samples: int) -> None:
        super().__init__(message)
        self.num_samples = num_samples


class DryStep(Callback):
    """Every rank runs the same micro-batch; nothing but time is different afterwards.

    Raises TooLargeError, on all ranks, when it does not fit into the memory of one.
    """

    def __init__(self, label: str, make_batch: Callable[[], Batch], micro_batch_tokens: int) -> None:
        self._label = label
        self._make_batch = make_batch
        self._micro_batch_tokens = micro_batch_tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        device = pl_module.device
        on_gpu = device.type == "cuda"
        batch = self._make_batch()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.monotonic()
        fits = self._try(trainer, pl_module, batch)
        if not fits and pl_module.sharding.waits_inside:
            # the others may stand in the middle of it: only the end of this process reaches them
            raise RunError(self._too_large(batch, device))
        if trainer.world_size > 1:  # or those it fits would wait for the others
            agreed = torch.tensor(int(fits), device=device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
            fits = bool(agreed)
        if not fits:
            raise TooLargeError(self._too_large(batch, device), num_samples=len(batch.sample_ids))
        if trainer.is_global_zero:
            seconds = time.monotonic() - started
            memory = f", peak memory {_gib(torch.cuda.max_memory_allocated(device))}" if on_gpu else ""
            text = f"{self._label}: the largest micro-batch fits: {_size(batch)}, {seconds:.1f} s{memory}."
            print(text, file=sys.stderr, flush=True)
        if on_gpu:  # or the first step's peak would be this one
            torch.cuda.reset_peak_memory_stats(device)

    def _try(self, trainer: Trainer, module: StageModule, batch: Batch) -> bool:
        try:
            with torch.random.fork_rng(_gpus(module.device)):
                on_device = trainer.strategy.batch_to_device(batch, module.device)
                if isinstance(module.sharding, Zero):
                    module.sharding.rehearse(on_device)
                else:
                    _rehearse(trainer, module, on_device)
                if module.device.type == "cuda":
                    torch.cuda.synchronize(module.device)
        except torch.OutOfMemoryError:
            return False
        return True

    def _too_large(self, batch: Batch, device: torch.device) -> str:
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            place = f"{facts.name} with {_gib(facts.total_memory)}"
        else:
            place = f"the memory of this {device.type}"
        budget = self._micro_batch_tokens
        advice = (
            f"Set trainer.micro_batch_tokens={budget // 2} (it is {budget}): that changes speed, no result."
            if len(batch.sample_ids) > 1
            else "It is a single sample, which no trainer.micro_batch_tokens splits: use a device with more "
            "memory, or a cell with a smaller LLM or a smaller max_length."
        )
        return (
            f"{self._label}: the largest micro-batch of the stage ({_size(batch)}) does not fit into {place} "
            f"beside weights, gradients and the optimizer's state. {advice}"
        )


def _rehearse(trainer: Trainer, module: StageModule, batch: Batch) -> None:
    with _room_for_a_step(trainer, module):
        with trainer.precision_plugin.train_step_context():
            loss = module.mllm(batch)
        # past DDP's wrapper: only its forward arms the reducing of gradients; no rank is waited for.
        # Sharded modules gather and reduce by themselves, on all ranks alike
        loss.backward()


@contextmanager
def memory_named(micro_batch_tokens: int) -> Iterator[None]:
    """Around the steps themselves: what no longer fits would not fit at the next try either."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "The device's memory was full in the middle of training, though the largest micro-batch had "
            "fitted at the start: something else uses it too, or it is in pieces. Start again with "
            f"trainer.micro_batch_tokens={micro_batch_tokens // 2} (it is {micro_batch_tokens}): that "
            f"changes speed, no result. {error}"
        ) from error


@contextmanager
def _room_for_a_step(trainer: Trainer, module: StageModule) -> Iterator[None]:
    """Holds what a later step finds in memory and the first does not: AdamW's two moments, which its first
    `step` makes, and from the second micro-batch of an accumulation on the gradients of those before.
    Without them the dry step would fit, and the second step would not. Gradients are put back as they were.
    """
    trained = list(module.trained().values())
    optimizer = trainer.optimizers[0]
    former = [value.grad for value in trained]
    try:
        # a resumed optimizer has its moments already
        held = [torch.empty_like(value) for value in 2 * trained if value not in optimizer.state]
        if trainer.accumulate_grad_batches > 1:
            for value in trained:
                value.grad = torch.zeros_like(value)
        yield
        del held
    finally:
        for value, gradient in zip(trained, former, strict=True):
            value.grad = gradient


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _size(batch: Batch) -> str:
    counts = len(batch.input_ids), len(batch.pixel_values), len(batch.targets)
    names = "tokens", "images", "supervised tokens"
    return ", ".join(f"{count:,} {name}" for count, name in zip(counts, names, strict=True))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
