"""The GPUs that an estimate is made for: those asked for, those of this machine, or the study's. No torch."""

from dataclasses import dataclass
from pathlib import Path

from morebench.config.gpus import Gpu, gpu, gpu_called
from morebench.config.schema import Trainer

_STUDY = "a100_64gb"
_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Machine:
    """What a run will have. `gpu` is None where nothing is known of the devices' speed and memory."""

    gpu: Gpu | None
    num_gpus: int  # ranks, on a machine without GPUs
    notes: tuple[str, ...] = ()  # what was assumed

    @property
    def memory(self) -> float | None:
        """Bytes of one GPU that a process can use."""
        return None if self.gpu is None else self.gpu.memory_gib * 2**30


def machine_of(trainer: Trainer, here: tuple[str, ...], is_planned: bool = True) -> Machine:
    """`here`: names of this machine's GPUs.

    A planned run may happen elsewhere: on `trainer.gpu`, and what is open is assumed. Otherwise only this
    machine counts.

    Raises ConfigError for a `trainer.gpu` that has no file.
    """
    notes: list[str] = []
    asked = gpu(trainer.gpu) if trainer.gpu is not None else None
    found = None
    if is_planned and asked is not None:
        found = asked
    elif trainer.accelerator == "cpu":
        pass
    elif here:
        found = gpu_called(here[0])
        if found is None:
            notes.append(f"no file in conf/gpus describes this machine's {here[0]}: set trainer.gpu")
    elif is_planned:
        found = gpu(_STUDY)
        notes.append(f"GPU: {found.label}, there being none here; another: trainer.gpu=NAME")
    if trainer.devices.isdigit():
        devices = int(trainer.devices)
    elif here and trainer.accelerator != "cpu" and not (is_planned and asked is not None):
        devices = len(here)
    else:
        devices = 1
        if found is not None:
            notes.append(f"trainer.devices={trainer.devices} is taken for 1 GPU a node")
    return Machine(found, devices * trainer.num_nodes, tuple(notes))


def gpus_here(driver: Path = _DRIVER) -> tuple[str, ...]:
    """The names that the NVIDIA driver gives to this machine's GPUs, in no order; none without a driver."""
    names = []
    for file in sorted(driver.glob("*/information")):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                names.append(value.strip())
    return tuple(names)
