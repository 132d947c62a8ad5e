"""The micro-batches of one rank, each a pure function of its number: workers and resume change nothing."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from morebench.data.batch import Batch, collate
from morebench.data.chat import ChatFormat
from morebench.data.checked import CheckedData
from morebench.data.features import FeatureCache
from morebench.data.image_processor import ImageProcessor
from morebench.data.images import decode_image
from morebench.data.packing import BatchPlan
from morebench.errors import DataError, WorkerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclass(frozen=True, eq=False)
class MicroBatches(Dataset[Batch]):
    """Item i is micro-batch i % K of optimizer step i // K."""

    data: CheckedData
    plan: BatchPlan
    chat: ChatFormat
    tokenizer: "Tokenizer"
    processor: ImageProcessor
    num_visual_tokens: int
    max_length: int
    rank: int
    features: FeatureCache | None = None  # read in place of pixels

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> Batch:
        step, k = divmod(item, self.plan.micro_batches)
        return self.micro_batch(step, self.plan.bin(step, self.rank, k))

    def micro_batch(self, step: int, ids: Sequence[int]) -> Batch:
        """Of these samples of the global batch of `step`."""
        samples = [self.data.samples[number] for number in ids]
        cache = self.features
        return collate(
            [self.chat.encode(s, self.tokenizer, self.num_visual_tokens, self.max_length) for s in samples],
            [] if cache else [pixels for number in ids for pixels in self.pixels(number)],
            ids,
            self.plan.supervised_tokens(step),
            self.processor.image_size,
            [found for number in ids for found in cache.of_sample(number)] if cache else (),
        )

    def pixels(self, number: int) -> list[np.ndarray]:
        """Of a sample's images: uint8 [S, S, 3] each."""
        return [self.processor(decode_image(content)) for content in self.data.read_images(number)]


class Loader:
    """Whole micro-batches from `first_step` on, in order; `num_workers` processes read ahead, two each.

    Raises DataError as the worker raised it.
    """

    def __init__(self, dataset: MicroBatches, first_step: int, num_workers: int) -> None:
        self._loader: DataLoader[Batch | DataError] = DataLoader(
            _Told(dataset),
            batch_size=None,
            sampler=range(first_step * dataset.plan.micro_batches, len(dataset)),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else every epoch would draw from, and so move, the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


@dataclass(frozen=True, eq=False)
class _Told(Dataset[Batch | DataError]):
    """An error is handed over like a batch: one that is raised comes out with a traceback in its text."""

    batches: MicroBatches

    def __getitem__(self, item: int) -> Batch | DataError:
        try:
            return self.batches[item]
        except DataError as error:
            return error


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Around what runs while a Loader is open: torch notices a killed worker anywhere, in several ways."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Pin memory")):
            raise
        raise WorkerError(
            "A process that reads training data died: killed from outside, most likely because the machine "
            "or the job was out of memory, or /dev/shm too small (the kernel's log says which). Lower "
            f"trainer.num_workers, or ask for more memory. It was noticed as {type(error).__name__}: {error}"
        ) from error


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive the fork
    # sent to a whole job or process group: the rank saves and ends, and this process with it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
