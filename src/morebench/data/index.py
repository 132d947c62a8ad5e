"""Token counts of every sample: what packing needs to know before the first batch is read."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from morebench.data.aside import replace_file
from morebench.data.chat import ChatFormat
from morebench.data.once import once
from morebench.data.records import Sample
from morebench.errors import DataError, join_problems
from morebench.processes import interrupts_held, start_pool_process, usable_cores
from morebench.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_CHUNK = 256  # samples tokenized at once
_PARALLEL_FROM = 20_000  # samples: starting processes takes seconds


@dataclass(frozen=True)
class LengthIndex:
    lengths: np.ndarray  # int32 [N]; tokens, visual ones included
    supervised: np.ndarray  # int32 [N]; supervised tokens that are predicted: a first token never is
    num_images: np.ndarray  # int32 [N]
    truncated: int  # samples cut at max_length
    unsupervised: int  # samples that teach nothing; they keep their place with zero weight

    @classmethod
    def of(cls, counts_4N: np.ndarray) -> "LengthIndex":
        """int32 rows: tokens, supervised ones, images, 1 where the sample was cut."""
        lengths, supervised, num_images, cut = counts_4N
        return cls(lengths, supervised, num_images, int(cut.sum()), int(np.count_nonzero(supervised == 0)))


def build_index(
    samples: Sequence[Sample],
    chat: ChatFormat,
    tokenizer: "Tokenizer",
    num_visual_tokens: int,
    max_length: int,
    cache: Path,
    key: str,
) -> LengthIndex:
    """`key` stands for the samples and the tokenizer: their content hashes. Raises DataError."""
    bos = (tokenizer.bos_token_id, tokenizer.eos_token_id)  # they decide whether a format's BOS is written
    identity = repr((key, len(samples), chat, bos, num_visual_tokens, max_length))
    path = cache / "lengths" / f"{sha256(identity.encode()).hexdigest()[:32]}.npy"
    job = _Job(samples, chat, tokenizer, num_visual_tokens, max_length)
    return once(path, lambda: _load(path, len(samples)), lambda: _make(job, path))


def _make(job: "_Job", path: Path) -> LengthIndex:
    counts_4N = _measure(job)
    index = LengthIndex.of(counts_4N)
    if index.unsupervised == len(job.samples):
        raise DataError(
            f"None of the {len(job.samples)} samples has a supervised token within "
            f"max_length={job.max_length} in chat format {job.chat.label!r}. "
            "Raise max_length or mend the answers."
        )
    _save(path, counts_4N)
    return index


def index_of(
    samples: Sequence[Sample],
    content_hash: str,
    chat: ChatFormat,
    tokenizer: "Tokenizer",
    num_visual_tokens: int,
    max_length: int,
    cache: Path,
) -> LengthIndex:
    """`build_index` of checked data: any cell with the same tokenizer, format and data finds it there."""
    content = sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key = f"{content_hash} {content} {tokenizer.bos_token}"
    return build_index(samples, chat, tokenizer, num_visual_tokens, max_length, cache, key)


@dataclass(frozen=True)
class _Job:
    """What a process needs to measure any range of the samples."""

    samples: Sequence[Sample]
    chat: ChatFormat
    tokenizer: "Tokenizer"
    num_visual_tokens: int
    max_length: int

    def measure(self, numbers: range) -> tuple[np.ndarray, list[str]]:
        """-> int32 [4, len(numbers)] as `LengthIndex.of` takes it, and what is wrong with samples."""
        counts = np.zeros((4, len(numbers)), np.int32)
        problems = []
        samples = [self.samples[number] for number in numbers]
        found = self.chat.count(samples, self.tokenizer, self.num_visual_tokens, self.max_length)
        for column, (sample, one) in enumerate(zip(samples, found, strict=True)):
            if isinstance(one, DataError):
                problems.append(f"sample {numbers[column]}: {one}")
            else:
                counts[:, column] = one.length, one.supervised, len(sample.images), one.truncated
        return counts, problems


def _measure(job: _Job) -> np.ndarray:
    """In as many processes as there are cores, where that pays. Raises DataError."""
    total = len(job.samples)
    chunks = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    if total < _PARALLEL_FROM:
        found = [job.measure(chunk) for chunk in chunks]
    else:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locked threads
        found = []
        with (
            ProcessPoolExecutor(usable_cores(), context, initializer=_start, initargs=(job,)) as pool,
            Progress(f"token lengths, {job.chat.label}", total) as progress,
        ):
            with interrupts_held():
                measured = pool.map(_measure_in_worker, chunks)
            for chunk, one in zip(chunks, measured, strict=True):
                found.append(one)
                progress.update(chunk.stop)
    if problems := [problem for _, some in found for problem in some]:
        raise DataError(join_problems(problems))
    return np.concatenate([counts for counts, _ in found], axis=1)


_job: _Job | None = None  # of a worker process


def _start(job: _Job) -> None:
    global _job
    _job = job
    start_pool_process()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core


def _measure_in_worker(numbers: range) -> tuple[np.ndarray, list[str]]:
    assert _job is not None
    return _job.measure(numbers)


def _load(path: Path, num_samples: int) -> LengthIndex | None:
    """Memory-mapped, so that ranks and cells share it."""
    try:
        counts_4N = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # absent, or damaged: measured anew
    return LengthIndex.of(counts_4N) if counts_4N.shape == (4, num_samples) else None


def _save(path: Path, counts_4N: np.ndarray) -> None:
    replace_file(path, lambda aside: np.save(aside, counts_4N))
