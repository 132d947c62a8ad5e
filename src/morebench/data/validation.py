"""Which samples are kept out of training, to measure the loss on. No torch."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from morebench.data.aside import replace_file
from morebench.data.once import once
from morebench.data.records import Sample


def validation_slice(samples: Sequence[Sample], count: int, content_hash: str, cache: Path) -> np.ndarray:
    """int64 [count], ascending; the samples with the smallest hashes.

    So a sample is in or out whatever the order of the records, and a larger slice contains a smaller one.
    `content_hash` stands for the samples: they are hashed once and then found in `cache`.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    path = cache / "validation" / f"{content_hash[:32]}.npy"
    hashes = once(path, lambda: _load(path, len(samples)), lambda: _make(samples, path))
    return np.sort(np.argsort(hashes, kind="stable")[:count])  # equal samples: the first of them


def sample_hash(sample: Sample) -> int:
    """64 bits of its id, texts and names of images."""
    content = [sample.id, sample.images, [(turn.question, turn.answer) for turn in sample.turns]]
    return int.from_bytes(sha256(json.dumps(content).encode()).digest()[:8], "big")


def _make(samples: Sequence[Sample], path: Path) -> np.ndarray:
    hashes = np.fromiter((sample_hash(sample) for sample in samples), np.uint64, len(samples))
    replace_file(path, lambda aside: np.save(aside, hashes))
    return hashes


def _load(path: Path, num_samples: int) -> np.ndarray | None:
    try:
        hashes: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # absent, or damaged: hashed anew
    return hashes if hashes.shape == (num_samples,) and hashes.dtype == np.uint64 else None
