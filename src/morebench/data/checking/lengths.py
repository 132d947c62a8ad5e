"""How long the samples of a data set are, as facts of its manifest."""

from typing import Any

import numpy as np

from morebench.data.index import LengthIndex
from morebench.data.store import RecordStore

NUM_BINS = 60
QUANTILES = (50, 90, 99, 100)


def length_name(llm: str, chat: str, num_visual_tokens: int, max_length: int) -> str:
    """What `Manifest.tokens` calls the lengths for an LLM (its choice) and a chat format (its label)."""
    return f"{llm}, chat {chat}, {num_visual_tokens} visual tokens, at most {max_length:,}"


def character_facts(samples: RecordStore) -> dict[str, Any]:
    """Of all questions and answers of a sample, image tokens included."""
    return _facts(samples.num_characters())


def token_facts(index: LengthIndex) -> dict[str, Any]:
    return {
        **_facts(index.lengths),
        "tokens": int(index.lengths.sum(dtype=np.int64)),
        "squared_lengths": int((index.lengths.astype(np.int64) ** 2).sum()),
        "supervised": int(index.supervised.sum(dtype=np.int64)),
        "images": int(index.num_images.sum(dtype=np.int64)),  # an image counts as often as it is shown
        "truncated": index.truncated,
        "unsupervised": index.unsupervised,
    }


def _facts(lengths: np.ndarray) -> dict[str, Any]:
    if not len(lengths):
        return {"quantiles": {}, "edges": [], "counts": []}
    low, high = max(1, int(lengths.min())), max(2, int(lengths.max()))
    edges = np.unique(np.ceil(np.geomspace(low, high + 1, NUM_BINS + 1)).astype(np.int64))
    counts, _ = np.histogram(np.maximum(lengths, 1), edges)
    quantiles = np.percentile(lengths, QUANTILES, method="higher")
    return {
        "quantiles": {str(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }
