"""Image files with the statistics of photographs, so that decoding them takes as long."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

NUM_BASES = 200  # distinct pictures of one size
SIZES = {"images": (352, 264), ".": (640, 480)}  # pixels: LCS was published scaled down, the others were not


class ImageFiles:
    """Below `root`. Every JPEG is one of some hundred pictures with a comment of its own, or a link."""

    def __init__(self, root: Path, seed: int, link: bool) -> None:
        self._root, self._link = root, link
        generator = np.random.default_rng(seed)
        photos = [Image.fromarray(photo) for photo in load_sample_images().images]
        size = SIZES.get(root.name, SIZES["."])
        self._bases = [_base(photos[number % len(photos)], size, generator) for number in range(NUM_BASES)]
        self._folders: set[Path] = set()
        self._linked: dict[int, Path] = {}

    def write(self, name: str, kind: str | None) -> None:
        """`kind` of `stand_in.BROKEN_IMAGES`; anything else writes a sound image."""
        path = self._root / name
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        if kind == "missing":
            path.unlink(missing_ok=True)
            return
        number = zlib.crc32(name.encode()) % NUM_BASES
        if kind in _BROKEN:
            path.unlink(missing_ok=True)  # it may be a link of an earlier call
            path.write_bytes(_BROKEN[kind](_commented(self._bases[number], name)))
        elif self._link and number in self._linked:
            path.unlink(missing_ok=True)
            os.link(self._linked[number], path)
        else:
            path.write_bytes(_commented(self._bases[number], name))
            self._linked[number] = path


def _base(photo: Image.Image, size: tuple[int, int], generator: np.random.Generator) -> bytes:
    """A random part of the photograph, brighter or darker, as a JPEG."""
    height = int(generator.integers(120, 300))
    width = height * size[0] // size[1]
    left = int(generator.integers(0, photo.width - width + 1))
    top = int(generator.integers(0, photo.height - height + 1))
    part = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    gain = generator.uniform(0.6, 1.3)
    return _encoded(part.point(lambda value: min(255, int(value * gain))), "JPEG", quality=75)


def _commented(jpeg: bytes, comment: str) -> bytes:
    """With a comment segment behind the start marker: another file, the same picture."""
    text = comment.encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + jpeg[2:]


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _small(jpeg: bytes) -> Image.Image:
    return Image.open(BytesIO(jpeg)).resize((320, 240))


def _deep(jpeg: bytes) -> bytes:
    values = np.asarray(_small(jpeg).convert("L"), np.uint16) * 257
    return _encoded(Image.fromarray(values), "PNG")


def _huge_header(jpeg: bytes) -> bytes:
    """A PNG that claims 12,000 x 12,000 pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


_BROKEN: dict[str | None, Callable[[bytes], bytes]] = {
    "damaged": lambda jpeg: jpeg[: len(jpeg) // 2],
    "empty_file": lambda jpeg: b"",
    "wrong_extension": lambda jpeg: _encoded(_small(jpeg), "GIF"),
    "cmyk": lambda jpeg: _encoded(_small(jpeg).convert("CMYK"), "JPEG"),
    "deep": _deep,
    "too_large": _huge_header,
}
