"""Learning rate as a pure function of the optimizer step, so that a resume has nothing to restore."""

import math


def num_warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Rounded up, as transformers does: 0.03 of 2,181 steps are 66."""
    return math.ceil(num_steps * warmup_ratio)


def cosine_with_warmup(step: int, num_steps: int, warmup_steps: int) -> float:
    """Factor on the peak rate: linear from 0 at the first step, then half a cosine towards 0.

    Same values as transformers' `get_cosine_schedule_with_warmup`.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
