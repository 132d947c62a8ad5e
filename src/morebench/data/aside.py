"""Files that are whole or not there, whoever else writes them at the same time."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` gets a path beside `path`, of the same suffix; the name is nobody else's on any machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(6)}{path.suffix}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda aside: aside.write_text(text))


def remove_leftovers(folder: Path) -> None:
    """Of killed writers. Only for who holds a lock on `folder`."""
    for leftover in folder.glob(".*.tmp-*"):
        leftover.unlink(missing_ok=True)
