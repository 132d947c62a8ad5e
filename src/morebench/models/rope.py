"""How many positions an LLM has before its rotary frequencies depend on its neighbours."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from morebench.config.compose import load_shape
from morebench.config.schema import LLM
from morebench.errors import ConfigError, DataError
from morebench.models.llm import llm_config


def fixed_positions(config: PretrainedConfig) -> int | None:
    """Positions up to which every sample is rotated alike; None: all of them.

    transformers chooses the frequencies of two kinds by the largest position of the *whole* batch: `longrope`
    (Phi-4) takes the long factors instead of the short ones, `dynamic` (NTK) a larger base. One long sample
    would change the logits of every other in its pack, and an answer that crosses the limit would mix keys
    of both in its cache.
    """
    rope = config.rope_parameters or {}
    limits = []
    for part in [rope] if "rope_type" in rope else rope.values():  # some families differ by kind of layer
        if part["rope_type"] == "longrope":
            limits.append(part["original_max_position_embeddings"])
        elif part["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def check_max_length(llm: LLM, max_length: int, key: str) -> None:
    """Raises ConfigError if training samples may be longer than `fixed_positions`."""
    limit = fixed_positions(llm_config(load_shape(llm.shape)))
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"{key}={max_length}, but {llm.label} rotates positions otherwise beyond "
            f"original_max_position_embeddings={limit}, for every sample of a pack as soon as one is longer. "
            f"Set {key}={limit} or less."
        )


def check_answers(llm: LLM, prompt_lengths: Sequence[int], max_new_tokens: int, task: str) -> None:
    """Raises DataError if an answer could cross `fixed_positions`: it would depend on its batch."""
    limit = fixed_positions(llm_config(load_shape(llm.shape)))
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
