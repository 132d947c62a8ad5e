"""Writing that survives a kill at any instant: aside, to the disk, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from morebench.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_full_named(path: Path, kept: str = "The last good checkpoint is kept") -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into DiskFullError. `kept`: what is not lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors (Rust) reports the number in its text only
        if getattr(error, "errno", None) in _FULL or any(f"os error {code}" in str(error) for code in _FULL):
            raise DiskFullError(
                f"No space left while writing {path}. {kept}: free some space, then start again to "
                "continue from it."
            ) from error
        raise


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename within a file system; durable when this returns."""
    os.replace(source, target)
    sync(target.parent)


def write_atomically(path: Path, text: str) -> None:
    """All of `text` or the old file, never a part of it. Raises DiskFullError."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_full_named(path):
        try:
            aside.write_text(text)
            sync(aside)
            replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Empty when there is none."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def remove_leftovers(path: Path) -> None:
    """What killed writers of a file left beside it; for a file that has one writer at a time."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def update_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Set fields of `manifest.json`; the others belong to someone else and stay."""
    remove_leftovers(folder / "manifest.json")
    manifest = {**read_manifest(folder), **fields}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
