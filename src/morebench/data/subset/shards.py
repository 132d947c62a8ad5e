"""The input of a subset: shards of metadata with an image folder beside, or tar shards with all in one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".tar", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Names to look for; of several the first that a shard (in tars: a sample) has."""

    id: tuple[str, ...] | None  # None: the key that a tar sample's members share
    caption: tuple[str, ...]
    image: str | None = None  # None: where img2dataset puts the image of `key`


# Published names: LAION-400M and LAION-5B (TEXT, URL, SAMPLE_ID), Recap-DataComp-1B (re_caption, url, key)
# and img2dataset's output (caption, url, key; the member key.txt in tars).
PUBLISHED = {
    "laion": Columns(id=("key", "SAMPLE_ID", "url", "URL"), caption=("caption", "TEXT", "txt")),
    "recap": Columns(id=("key", "url"), caption=("re_caption",)),
}


@dataclass(frozen=True)
class Shard:
    path: Path
    name: str  # the input folder's name and the path below it
    size: int
    mtime_ns: int

    @property
    def is_tar(self) -> bool:
        return self.path.suffix == ".tar"


@dataclass(frozen=True)
class Source:
    name: str
    shards: tuple[Shard, ...]
    images: Path | None  # None: the images are in the shards
    columns: Columns
    allowed_links: tuple[str, ...] = ()  # of ImageFolder


def find_shards(inputs: Sequence[Path], images: Path | None) -> tuple[Shard, ...] | str:
    """Shards of one kind, by name, or what is wrong.

    img2dataset writes a parquet file beside every tar. Without `images` the tars are meant, with it the
    others.
    """
    try:
        found = [shard for given in inputs for shard in _shards_of(given)]
    except OSError as error:
        return f"{error.filename}: {error.strerror}; expected .tar or .parquet shards."
    found = list({shard.path: shard for shard in found if shard.path.suffix in SUFFIXES}.values())
    tars = [shard for shard in found if shard.is_tar]
    chosen = tars if tars and images is None else [shard for shard in found if not shard.is_tar]
    if chosen:
        return tuple(sorted(chosen, key=lambda shard: (shard.name, str(shard.path))))
    where = ", ".join(map(str, inputs))
    if tars:
        return f"{where}: only .tar shards, which hold their images. Leave images=... out."
    return f"{where}: no .tar or .parquet shards there; compressed tars must be unpacked to .tar first."


def _shards_of(given: Path) -> list[Shard]:
    given.stat()
    shards = []
    for path in [given] if given.is_file() else sorted(_below(given)):
        name = given.name if path == given else f"{given.name}/{path.relative_to(given).as_posix()}"
        stat = path.stat()
        shards.append(Shard(path.resolve(), name, stat.st_size, stat.st_mtime_ns))
    return shards


def _below(folder: Path) -> list[Path]:
    """Follows links, every folder once. Raises OSError for one that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent) / name for name in names if name.endswith(SUFFIXES)]
    return [path for path in found if path.is_file()]
