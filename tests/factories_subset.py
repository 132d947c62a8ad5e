"""Shards as LAION, Recap-DataComp-1B and img2dataset publish them, with a few pictures."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@cache
def picture(number: int, suffix: str = "jpeg") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


@dataclass(frozen=True)
class Pair:
    key: str
    caption: Any
    content: bytes | None  # None: no image


def pairs(count: int, shard: int = 0) -> list[Pair]:
    return [
        Pair(f"{shard:05d}{n:04d}", f"Caption {n} of {shard}.", picture(1000 * shard + n))
        for n in range(count)
    ]


def write_tar(path: Path, rows: Sequence[Pair], field: str = "re_caption") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row in rows:
            if row.content is not None:
                add_member(archive, f"{row.key}.jpg", row.content)
            add_member(archive, f"{row.key}.txt", b"the short one")
            fields = {"key": row.key, field: row.caption, "status": "success"}
            add_member(archive, f"{row.key}.json", json.dumps(fields).encode())
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, rows: Sequence[Pair], images: Path, field: str = "re_caption") -> Path:
    """Images go below `images`, where img2dataset puts them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row.content is not None:
            image = images / row.key[:5] / f"{row.key}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(row.content)
    table = {
        "url": [f"http://host/{row.key}" for row in rows],
        field: [row.caption for row in rows],
        "key": [row.key for row in rows],
    }
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path
