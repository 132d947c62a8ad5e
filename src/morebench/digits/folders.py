"""Built folders appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import getpid
from pathlib import Path
from shutil import rmtree


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end. When another process was faster, its result stays."""
    draft = folder.with_name(f"{folder.name}.tmp-{getpid()}")
    rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if not folder.exists():
            draft.rename(folder)
    finally:
        rmtree(draft, ignore_errors=True)
