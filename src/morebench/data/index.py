"""Token counts of every sample: what packing needs to know before the first batch is read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from morebench.data.chat import ChatFormat
from morebench.data.records import Sample
from morebench.errors import DataError, join_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclass(frozen=True)
class LengthIndex:
    lengths: np.ndarray  # int32 [N]; tokens, visual ones included
    supervised: np.ndarray  # int32 [N]; supervised tokens that are predicted: a first token never is
    num_images: np.ndarray  # int32 [N]
    truncated: int  # samples cut at max_length
    unsupervised: int  # samples that teach nothing; they keep their place with zero weight


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
    path = cache / "lengths" / f"{sha256(identity.encode()).hexdigest()[:32]}.npz"
    if (stored := _load(path, len(samples))) is not None:
        return stored
    index = _measure(samples, chat, tokenizer, num_visual_tokens, max_length)
    if index.unsupervised == len(samples):
        raise DataError(
            f"None of the {len(samples)} samples has a supervised token within max_length={max_length} "
            f"in chat format {chat.label!r}. Raise max_length or mend the answers."
        )
    _save(path, index)
    return index


def _measure(
    samples: Sequence[Sample],
    chat: ChatFormat,
    tokenizer: "Tokenizer",
    num_visual_tokens: int,
    max_length: int,
) -> LengthIndex:
    lengths = np.zeros(len(samples), np.int32)
    supervised = np.zeros(len(samples), np.int32)
    truncated, problems = 0, []
    for number, sample in enumerate(samples):
        try:
            encoded = chat.encode(sample, tokenizer, num_visual_tokens, max_length)
        except DataError as error:
            problems.append(f"sample {number}: {error}")
            continue
        lengths[number] = len(encoded.input_ids)
        supervised[number] = np.count_nonzero(encoded.supervised[1:])
        truncated += encoded.truncated
    if problems:
        raise DataError(join_problems(problems))
    num_images = np.array([len(sample.images) for sample in samples], np.int32)
    return LengthIndex(lengths, supervised, num_images, truncated, int(np.count_nonzero(supervised == 0)))


def _load(path: Path, num_samples: int) -> LengthIndex | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[name] for name in ("lengths", "supervised", "num_images")]
            counts = [int(stored[name]) for name in ("truncated", "unsupervised")]
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        return None  # absent, or damaged: measured anew
    return LengthIndex(*arrays, *counts) if all(len(array) == num_samples for array in arrays) else None


def _save(path: Path, index: LengthIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".tmp-{os.getpid()}.npz")
    np.savez(
        aside,
        lengths=index.lengths,
        supervised=index.supervised,
        num_images=index.num_images,
        truncated=index.truncated,
        unsupervised=index.unsupervised,
    )
    aside.replace(path)  # ranks and runs may write at once; each sees a whole file
