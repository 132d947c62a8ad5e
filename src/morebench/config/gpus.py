"""GPU types: the files of conf/gpus."""

import re
from dataclasses import dataclass
from functools import cache

import yaml

from morebench.config.compose import config_dirs
from morebench.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    label: str
    device_name: str  # regular expression on the name the driver gives
    memory_gib: float  # that a process can use
    bf16_tflops: float  # peak of dense products, from the data sheet: what MFU divides by
    reached: float  # share of it that estimates expect of a train step
    reached_answering: float  # and of an evaluate step, which waits for memory and kernel launches


@cache
def gpus() -> dict[str, Gpu]:
    """By file stem."""
    files = [path for folder in config_dirs() for path in sorted((folder / "gpus").glob("*.yaml"))]
    return {path.stem: Gpu(**yaml.safe_load(path.read_text())) for path in files}


def gpu(name: str) -> Gpu:
    """Raises ConfigError for a name that has no file."""
    if name not in gpus():
        there = ", ".join(gpus())
        raise ConfigError(f"trainer.gpu={name}: there is no conf/gpus/{name}.yaml. There are: {there}.")
    return gpus()[name]


def gpu_called(device_name: str) -> Gpu | None:
    """The type of a device by the name its driver gives; None for one without a file."""
    return next((one for one in gpus().values() if re.search(one.device_name, device_name)), None)
