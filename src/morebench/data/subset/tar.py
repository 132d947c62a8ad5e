"""Candidates of a webdataset shard: members `KEY.jpg`, `KEY.txt`, `KEY.json`, neighbours in the tar.

Nothing is unpacked by a name from the tar: images are read by offset and named by their own hash.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from morebench.data.images import MAX_IMAGE_BYTES
from morebench.data.subset.candidates import CandidateWriter
from morebench.data.subset.drops import Drop
from morebench.data.subset.shards import Columns

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_TEXT_BYTES = 2**20
KEY = "key"


@dataclass
class _Sample:
    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    image: tuple[str, int, int, bytes] | None = None  # suffix, offset, size, sha256
    seen: set[str] = field(default_factory=set)  # suffixes
    too_large: bool = False


def scan_tar(
    path: Path, columns: Columns, writer: CandidateWriter
) -> tuple[int, dict[str, str], str | None, str | None]:
    """Samples read, fields used, what is wrong with the file from some place on, what the user must mend."""
    num_samples, damages = 0, list[str]()
    used: set[str] = set()
    names: dict[str, None] = {}
    for sample in _samples(path, writer, damages):
        num_samples += 1
        names |= dict.fromkeys(sample.fields)
        caption = next((name for name in columns.caption if name in sample.fields), None)
        used |= {caption} if caption else set()
        _add(sample, columns, caption, writer)
    problem = None
    if num_samples and not used:
        there = ", ".join(names) or "none"
        problem = (
            f"{path}: no sample has {' or '.join(columns.caption)} (columns.caption). Its fields: {there}."
        )
    return num_samples, {"caption": ", ".join(sorted(used))}, damages[0] if damages else None, problem


def _add(sample: _Sample, columns: Columns, caption: str | None, writer: CandidateWriter) -> None:
    if sample.too_large:
        return writer.drop(Drop.too_large)
    if sample.image is None:
        return writer.drop(Drop.no_image)
    given: Any = sample.key
    if columns.id is not None:
        given = next((sample.fields[name] for name in columns.id if name in sample.fields), None)
    suffix, offset, size, digest = sample.image
    writer.add(given, sample.fields[caption] if caption else None, suffix, offset, size, digest)


def _samples(path: Path, writer: CandidateWriter, damages: list[str]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # it would keep all of them
                if (split := _split(member)) is None:
                    if not member.isdir():
                        writer.drop(Drop.refused_member)
                    continue
                key, suffix = split
                if sample is None or sample.key != key or suffix in sample.seen:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                sample.seen.add(suffix)
                _read(archive, member, suffix, sample)
            end = archive.offset
        if not _ends_at(path, end):
            damages.append(f"damaged or cut off at byte {end}")
    except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        damages.append(f"damaged or cut off ({error})")
    if sample is not None:
        yield sample


def _ends_at(path: Path, offset: int) -> bool:
    """A whole tar ends with zeros; tarfile takes anything behind the first member for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


def _split(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and suffix: a key goes up to the first dot of the file's name."""
    path = PurePosixPath(member.name)
    if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
        return None
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), f".{suffix.lower()}"


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample) -> None:
    is_image = suffix in IMAGE_SUFFIXES
    if not is_image and suffix not in (".txt", ".json"):
        return
    if member.size > (MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES):
        sample.too_large = True
        return
    file = archive.extractfile(member)
    content = file.read() if file is not None else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    if is_image and sample.image is None:
        sample.image = suffix, member.offset_data, member.size, sha256(content).digest()
    elif suffix == ".txt":
        sample.fields["txt"] = _text(content)
    elif suffix == ".json":
        sample.fields = _json(content) | sample.fields


def _text(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _json(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
