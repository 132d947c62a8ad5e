"""Reads and decodes the image of a candidate, and lays it down under the name of its hash."""

import os
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from morebench.data.findings import Kind, SampleError
from morebench.data.image_folder import ImageFolder
from morebench.data.images import decode_image, read_image
from morebench.data.subset.drops import Drop
from morebench.data.subset.ranking import Candidate
from morebench.data.subset.shards import Source
from morebench.data.subset.tar import IMAGE_SUFFIXES

# by the kind of SampleError that reading gives; a folder or an unreadable file is an unusable image
_DROPS = {Kind.missing: Drop.missing_image, Kind.outside: Drop.outside, Kind.too_large: Drop.too_large}


@dataclass(frozen=True)
class Looked:
    """`image` is the path below the images folder."""

    image: str
    problem: Drop | None


class Looker:
    """Safe to call from several threads. `spare` is a folder on the file system of `images`."""

    def __init__(self, source: Source, images: Path, spare: Path) -> None:
        self._source, self._images, self._spare = source, images, spare
        self._folder = None if source.images is None else ImageFolder(source.images, source.allowed_links)

    def __call__(self, candidate: Candidate) -> Looked:
        try:
            found = self._find(candidate)
            content = found if isinstance(found, bytes) else read_image(found)
        except SampleError as error:
            return Looked("", _DROPS.get(error.kind, Drop.unusable_image))
        except OSError:  # a name too long, a shard that is gone
            return Looked("", Drop.unusable_image)
        try:
            decode_image(content)
        except SampleError:
            return Looked("", Drop.unusable_image)
        original = None if isinstance(found, bytes) else found
        suffix = candidate["place"] if original is None else original.suffix.lower()
        name = sha256(content).hexdigest()
        image = f"{name[:2]}/{name}{suffix if suffix in IMAGE_SUFFIXES else ''}"
        self._lay_down(image, content, original)
        return Looked(image, None)

    def is_there(self, looked: Looked) -> bool:
        """Whether what was found still holds: an image may have come, or a link been allowed since."""
        if looked.problem is not None:
            return looked.problem not in (Drop.missing_image, Drop.outside)
        return (self._images / looked.image).exists()

    def _find(self, candidate: Candidate) -> bytes | Path:
        """The bytes from a tar, or the path of a file."""
        if self._folder is None:
            with self._source.shards[candidate["shard"]].path.open("rb") as shard:
                shard.seek(candidate["offset"])
                return shard.read(candidate["size"])
        place = candidate["place"]
        if self._source.columns.image is not None:
            return self._folder.path(place)
        for suffix in IMAGE_SUFFIXES:
            if (path := self._folder.path(place + suffix)).exists():
                return path
        raise SampleError(Kind.missing, f"{self._folder.root / place}: no file with the suffix of an image.")

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


def _linked(original: Path, link: Path) -> bool:
    try:
        os.link(os.path.realpath(original), link)
    except OSError:  # another file system, or one without hard links
        return False
    return True
