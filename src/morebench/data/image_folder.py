"""Paths that a record names, kept inside the folder of images: a record comes from elsewhere."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from morebench.data.findings import Kind, SampleError, printable
from morebench.errors import ConfigError

_URL = re.compile(r"(?i).*://|(?:file|data|https?):")


@dataclass(frozen=True)
class ImageFolder:
    """Safe for threads."""

    root: Path
    allowed_links: Sequence[str] = ()  # folders outside `root` that symbolic links in it may lead to

    def __post_init__(self) -> None:
        if relative := [one for one in self.allowed_links if not Path(one).is_absolute()]:
            raise ConfigError(f"allowed_links={relative}: expected absolute paths.")

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageFolder, (self.root, self.allowed_links)

    def path(self, relative: str) -> Path:
        """Whether there is a file is not asked. Raises SampleError for what does, or could, lead outside."""
        if not _is_path(relative):
            raise self._outside(relative, f"is not the path of a file relative to {self.root}.")
        if _leads_up(relative):
            raise self._outside(relative, f"points outside {self.root}; expected a path relative to it.")
        path = self.root / relative
        if not self._is_parent_inside(path.parent) or (os.path.islink(path) and not self._is_inside(path)):
            links = (one for one in (*reversed(path.parents), path) if one.is_relative_to(self.root))
            target = next(_real(one) for one in links if not self._is_inside(one))
            folder = target if target.is_dir() else target.parent
            raise self._outside(
                relative,
                f"is behind a symbolic link that leads out of {self.root}, to {target}. If that is meant, "
                f"set allowed_links=[{folder}] of this data choice.",
            )
        return path

    def _outside(self, relative: str, reason: str) -> SampleError:
        return SampleError(Kind.outside, f"image {printable(relative)!r} {reason}")

    @cached_property
    def _is_parent_inside(self) -> Callable[[Path], bool]:
        return lru_cache(maxsize=2**16)(self._is_inside)

    def _is_inside(self, path: Path) -> bool:
        real = _real(path)
        return any(real.is_relative_to(root) for root in self._real_roots)

    @cached_property
    def _real_roots(self) -> tuple[Path, ...]:
        return tuple(map(_real, (self.root, *map(Path, self.allowed_links))))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text and not _URL.match(text) and bool(text.strip("./"))


def _leads_up(text: str) -> bool:
    """A Windows path is split at both slashes: the same is refused on every machine."""
    if "\\" in text or ":" in text:
        path = PureWindowsPath(text)
        return bool(path.anchor) or ".." in path.parts
    return text.startswith("/") or ".." in text.split("/")
