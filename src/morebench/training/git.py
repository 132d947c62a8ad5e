"""Which code this is. No torch."""

import hashlib
import subprocess
from pathlib import Path


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


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
