"""How many positions an LLM has before its rotary frequencies depend on its neighbours."""

from collections.abc import Mapping, Sequence
from typing import Any

from morebench.config.compose import load_shape
from morebench.config.schema import LLM
from morebench.errors import ConfigError, DataError

_SWITCHING = ("longrope", "dynamic")


def fixed_positions(shape: Mapping[str, Any]) -> int | None:
    """Positions up to which every sample is rotated alike; None: all of them.

    transformers chooses the frequencies of these kinds by the largest position of the *whole* batch: in
    `longrope` (Phi-4) the long factors instead of the short ones, in `dynamic` (NTK) a growing base. One long
    sample would change the logits of every other in its pack, and a cached answer that crosses the limit
    would mix keys of both.
    """
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) not in _SWITCHING:
        return None
    own = rope.get("original_max_position_embeddings", shape.get("original_max_position_embeddings"))
    return own if own is not None else shape["max_position_embeddings"]


def check_max_length(llm: LLM, max_length: int, key: str) -> None:
    """Raises ConfigError if training samples may be longer than `fixed_positions`."""
    limit = fixed_positions(load_shape(llm.shape))
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"{key}={max_length}, but {llm.label} rotates positions otherwise beyond "
            f"original_max_position_embeddings={limit}, for every sample of a pack as soon as one is longer. "
            f"Set {key}={limit} or less."
        )


def check_answers(llm: LLM, prompt_lengths: Sequence[int], max_new_tokens: int, task: str) -> None:
    """Raises DataError if an answer could cross `fixed_positions`: it would depend on its batch."""
    limit = fixed_positions(load_shape(llm.shape))
    if limit is None:
        return
    crossing = [length for length in prompt_lengths if length + max_new_tokens > limit]
    if crossing:
        raise DataError(
            f"task {task}: {len(crossing)} of {len(prompt_lengths)} prompts (the longest has {max(crossing)} "
            f"tokens) and max_new_tokens={max_new_tokens} may exceed the {limit} positions within which "
            f"{llm.label} answers an item alike in every batch. Shorten the prompts or lower "
            f"suite.tasks.{task}.max_new_tokens."
        )
