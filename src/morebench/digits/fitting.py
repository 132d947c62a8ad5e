"""Training of the tiny parts: one thread, deterministic, a minute at most."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import cos, pi

import torch
from torch import Tensor, nn

from morebench.progress import track

WARMUP_SHARE = 0.05
GRADIENT_CLIP = 1.0


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread and deterministic kernels, so that a seed gives the same bytes; restored at the end."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def fit(
    matrices: Iterable[nn.Parameter],
    others: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    lr: float,
    label: str,
) -> None:
    """Muon for `matrices` (the weights of the blocks), which learn in half the steps; AdamW for `others`."""
    matrices, others = list(matrices), list(others)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    for step in track(range(steps), label):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            optimizer.zero_grad()
        loss_of_step(step).backward()
        nn.utils.clip_grad_norm_([*matrices, *others], GRADIENT_CLIP)
        for optimizer in optimizers:
            optimizer.step()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1.0, WARMUP_SHARE * steps)
    return min(1.0, (step + 1) / warmup) * (1 + cos(pi * step / steps)) / 2
