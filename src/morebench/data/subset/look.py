"""Reads and decodes the image of a candidate, and lays it down under the name of its hash."""

import os
import stat
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from morebench.data.images import decode_image, resolve_inside
from morebench.data.subset.drops import Drop
from morebench.data.subset.ranking import Candidate
from morebench.data.subset.shards import Source
from morebench.data.subset.tar import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from morebench.errors import DataError


@dataclass(frozen=True)
class Looked:
    """`image` is the path below the images folder."""

    image: str
    problem: Drop | None


class Looker:
    """Safe to call from several threads. `spare` is a folder on the file system of `images`."""

    def __init__(self, source: Source, images: Path, spare: Path) -> None:
        self._source, self._images, self._spare = source, images, spare

    def __call__(self, candidate: Candidate) -> Looked:
        try:
            found = self._find(candidate)
            content = found if isinstance(found, bytes) else _read(found)
        except FileNotFoundError:
            return Looked("", Drop.missing_image)
        except DataError:
            return Looked("", Drop.outside)
        except OSError:  # a folder, a name too long, an unreadable file
            return Looked("", Drop.unusable_image)
        if content is None:
            return Looked("", Drop.too_large)
        try:
            decode_image(content)
        except (DataError, MemoryError):
            return Looked("", Drop.unusable_image)
        original = None if isinstance(found, bytes) else found
        suffix = candidate["place"] if original is None else original.suffix.lower()
        name = sha256(content).hexdigest()
        image = f"{name[:2]}/{name}{suffix if suffix in IMAGE_SUFFIXES else ''}"
        self._lay_down(image, content, original)
        return Looked(image, None)

    def is_there(self, looked: Looked) -> bool:
        """Whether what a killed build found still holds; a missing image may have come since."""
        if looked.problem is not None:
            return looked.problem is not Drop.missing_image
        return (self._images / looked.image).exists()

    def _find(self, candidate: Candidate) -> bytes | Path:
        """The bytes from a tar, or the path of a file."""
        if self._source.images is None:
            with self._source.shards[candidate["shard"]].path.open("rb") as shard:
                shard.seek(candidate["offset"])
                return shard.read(candidate["size"])
        path = resolve_inside(self._source.images, candidate["place"])
        if self._source.columns.image is not None:
            return path
        for suffix in IMAGE_SUFFIXES:
            if (named := path.with_name(path.name + suffix)).exists():
                return named
        raise FileNotFoundError(path)

    def _lay_down(self, image: str, content: bytes, original: Path | None) -> None:
        target = self._images / image
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = self._spare / f"{os.getpid()}-{threading.get_ident()}"
        aside.unlink(missing_ok=True)
        if original is None or not _linked(original, aside):
            aside.write_bytes(content)
        aside.replace(target)


def _read(path: Path) -> bytes | None:
    """None for a file that is too large. Raises OSError, also for what is no file: a pipe never ends."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise IsADirectoryError(path)
    return path.read_bytes() if found.st_size <= MAX_IMAGE_BYTES else None


def _linked(original: Path, link: Path) -> bool:
    try:
        os.link(os.path.realpath(original), link)
    except OSError:  # another file system, or one without hard links
        return False
    return True
