"""The micro-batches of one rank, each a pure function of its number: workers and resume change nothing."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from morebench.data.batch import Batch, collate
from morebench.data.chat import ChatFormat
from morebench.data.check import CheckedData
from morebench.data.features import FeatureCache
from morebench.data.images import ImageProcessor, load_image, resolve_inside
from morebench.data.packing import BatchPlan
from morebench.data.records import Sample
from morebench.errors import DataError

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
        ids = self.plan.bin(step, self.rank, k)
        samples = [self.data.samples[number] for number in ids]
        cache = self.features
        return collate(
            [self.chat.encode(s, self.tokenizer, self.num_visual_tokens, self.max_length) for s in samples],
            [] if cache else [pixels for sample in samples for pixels in self._pixels(sample)],
            ids,
            self.plan.supervised_tokens(step),
            self.processor.image_size,
            [found for number in ids for found in cache.of_sample(number)] if cache else (),
        )

    def _pixels(self, sample: Sample) -> list[np.ndarray]:
        try:
            paths = [resolve_inside(self.data.images_root, image) for image in sample.images]
            return [self.processor(load_image(path)) for path in paths]
        except DataError as error:
            raise DataError(f"record id {sample.id!r}: {error}") from None


def loader(dataset: MicroBatches, first_step: int, num_workers: int) -> DataLoader[Batch]:
    """Whole micro-batches from `first_step` on, in order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step * dataset.plan.micro_batches, len(dataset)),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else every epoch would draw from, and so move, the global one
    )


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive the fork
