"""What an LLM's shape must say before anything can be planned from it. No torch, no transformers."""

from collections.abc import Iterator, Mapping
from typing import Any

_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
REQUIRED = ("model_type", *_COUNTS, "tie_word_embeddings")


def llm_problems(shape: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for everything that is missing, or no number where one must stand."""
    if missing := [field for field in REQUIRED if field not in shape]:
        yield f"llm.shape lacks {', '.join(missing)}: see the config.json of the published model."
    for field in _COUNTS:
        if field in shape and (type(shape[field]) is not int or shape[field] < 1):
            yield f"llm.shape: {field} must be a whole number above 0, found {shape[field]!r}."
    if not isinstance(shape.get("model_type", ""), str):
        yield f"llm.shape: model_type must be a name such as llama, found {shape['model_type']!r}."
