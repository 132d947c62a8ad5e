"""How many positions an LLM has before its rotary frequencies depend on its neighbours."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from morebench.config.compose import load_shape
from morebench.config.schema import LLM
from morebench.errors import ConfigError
from morebench.models.llm import llm_config


def fixed_positions(config: PretrainedConfig) -> int | None:
    """Positions up to which every sample is rotated alike; None: all of them.

    transformers chooses the frequencies of two kinds by the largest position of the *whole* batch: `longrope`
    (Phi-4) takes the long factors instead of the short ones, `dynamic` (NTK) a larger base. One long sample
    would change the logits of every other in its pack, and an answer that crosses the limit would mix keys
    of both in its cache.
    """
    limits = []
    for part in _parts(config):
        if part["rope_type"] == "longrope":
            limits.append(part["original_max_position_embeddings"])
        elif part["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def _parts(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = config.rope_parameters or {}
    return [rope] if "rope_type" in rope else list(rope.values())  # some families differ by kind of layer


def check_max_length(llm: LLM, max_length: int, key: str) -> None:
    """Raises ConfigError if training samples may be longer than `fixed_positions`."""
    limit = fixed_positions(llm_config(load_shape(llm.shape)))
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"{key}={max_length}, but {llm.label} rotates positions otherwise beyond "
            f"original_max_position_embeddings={limit}, for every sample of a pack as soon as one is longer. "
            f"Set {key}={limit} or less."
        )


def rotation(config: PretrainedConfig, length: int) -> int:
    """Which frequencies rotate a sequence of this length: equal numbers, equal frequencies.

    A longer answer that gets another number must be computed anew from its first token: that is what the
    families were trained for, and what transformers' Phi-3 does at the crossing.
    """
    limit = fixed_positions(config)
    if limit is None or length <= limit:
        return 0
    kinds = {part["rope_type"] for part in _parts(config)}
    return length if "dynamic" in kinds else 1


def forget_rotation(llm: PreTrainedModel) -> None:
    """Undo what longer sequences left behind: `dynamic` keeps the frequencies of the longest so far."""
    for module in llm.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            rotary: Any = module
            rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
            rotary.max_seq_len_cached = rotary.original_max_seq_len
