"""Where the time and memory of an optimizer step go, on one rank."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from morebench.training.energy import EnergyMeter

Mark = float | torch.cuda.Event  # a moment: of the clock, or of the GPU's queue


@dataclass(frozen=True)
class Timing:
    """Seconds of one optimizer step."""

    step: float
    forward: float
    backward: float
    optimizer: float | None  # from the last backward on; on a GPU that of the step before


class _MicroBatch(NamedTuple):
    forward: Mark
    backward: Mark
    end: Mark


class StepClock:
    """On a GPU nothing is waited for: events are read once the module has read the loss of their step.

    The optimizer's own event is then still to come, and is read a step later.
    """

    def start(self, device: torch.device) -> None:
        """Once, before anything runs."""
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._energy = EnergyMeter(device)
        self._done: list[_MicroBatch] = []
        self._optimizer: tuple[Mark, Mark] | None = None
        self._waited = 0.0

    def step_begins(self) -> None:
        """After whatever else was done between two steps: checkpoints and validation are part of none."""
        self._step_began = self._batch_ended = time.perf_counter()
        self._waited = 0.0

    def batch_begins(self) -> None:
        self._waited += time.perf_counter() - self._batch_ended
        self._forward = self._mark()

    def backward_begins(self) -> None:
        self._backward = self._mark()

    def backward_ends(self) -> None:
        self._done.append(_MicroBatch(self._forward, self._backward, self._mark()))

    def batch_ends(self) -> None:
        self._batch_ended = time.perf_counter()

    def step_ends(self) -> Timing:
        ended, seconds = self._mark(), time.perf_counter() - self._step_began
        done, self._done = self._done, []
        optimizer: tuple[Mark, Mark] | None = done[-1].end, ended
        if self._on_gpu:
            optimizer, self._optimizer = self._optimizer, optimizer
        return Timing(
            step=seconds,
            forward=sum(_seconds(one.forward, one.backward) for one in done),
            backward=sum(_seconds(one.backward, one.end) for one in done),
            optimizer=None if optimizer is None else _seconds(*optimizer),
        )

    @property
    def data_wait(self) -> float:
        """Seconds of this step so far in which there was no micro-batch."""
        return self._waited

    def peak_memory(self) -> int:
        """Bytes. GPU: most that tensors took since this was last asked. CPU: most the process ever took."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def joules(self) -> float:
        """Of this rank's device since `start`; NaN where the driver does not tell."""
        return self._energy.joules()

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000
