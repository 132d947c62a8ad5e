"""Where a number came from: code, packages, machine. Written into every manifest."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from morebench.training.files import sha256
from morebench.training.git import git_state

_PACKAGES = ("torch", "transformers", "lightning", "timm", "open_clip_torch", "tokenizers", "safetensors")


def provenance(root: Path) -> dict[str, Any]:
    """`root` is the repository; outside one, `git` and `lock_sha256` are null."""
    lock = root / "requirements.lock"
    return {
        "git": git_state(root),
        "lock_sha256": sha256(lock) if lock.is_file() else None,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": platform.node(), "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpus": gpus}


def versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
