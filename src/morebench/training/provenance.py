"""Where a number came from: code, packages, machine. Written into every manifest."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from morebench.training.files import sha256

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


def git_state(root: Path) -> dict[str, str | None] | None:
    """`commit`, and the hash of what differs from it (tracked files) or null when nothing does."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(root, "diff", "HEAD") or b""
    return {
        "commit": commit.decode().strip(),
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
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


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
