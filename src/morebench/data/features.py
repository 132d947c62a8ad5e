"""Reads vision features out of shards, in place of decoding images and running the encoder.

    manifest.json              written last: with it the cache is complete
    shard-00000.safetensors    features [n, V, C], checksums [n]; in 8 bit also scales [n, V, G]

Images are numbered as they first appear in the samples; a shard holds `images_per_shard` of them in a row, so
that a number says where its features lie. Every image is checked against its checksum when it is read.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morebench.data.store import RecordStore
from morebench.errors import DataError, join_problems

MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class ImageNumbers:
    """Each distinct image of the samples once, numbered in the order of the samples."""

    names: pa.Array
    in_check: np.ndarray  # int32 [num_images]; number of each among all images of the check
    _first: np.ndarray  # int32 [N + 1]; sample n shows _of[_first[n]:_first[n + 1]]
    _of: np.ndarray  # int32; numbers of images

    @classmethod
    def of(cls, samples: RecordStore) -> "ImageNumbers":
        first, shown = samples.shown()
        coded = pa.array(shown).dictionary_encode()
        names = pa.array(samples.image_names(), pa.large_string()).take(coded.dictionary)
        return cls(names, np.asarray(coded.dictionary), first, np.asarray(coded.indices))

    def __len__(self) -> int:
        return len(self.names)

    def of_sample(self, number: int) -> list[int]:
        return self._of[self._first[number] : self._first[number + 1]].tolist()

    @property
    def shown(self) -> int:
        """How many images all samples show: one that is in two samples counts twice."""
        return len(self._of)


class FeatureCache:
    """A complete cache. Raises DataError for all that is missing or has another size.

    `mend` is the command that builds, or mends, this cache; errors name it.
    """

    def __init__(self, folder: Path, images: ImageNumbers, mend: str) -> None:
        self.folder = folder
        self.images = images
        self._mend = mend
        self._manifest = read_manifest(folder)
        if self._manifest is None:
            raise DataError(f"{folder} holds no complete feature cache: no {MANIFEST}. Build it: {mend}")
        problems = [*shard_problems(folder, self._manifest)]
        if self._manifest["num_images"] != len(images):
            problems.append(f"{self._manifest['num_images']} images; the samples show {len(images)}.")
        if problems:
            raise DataError(join_problems([f"{folder} is damaged. Mend it: {mend}", *problems]))

    def of_sample(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """(features `[V, C]`, scales `[V, G]`) of every image of a sample; G is 0 where nothing is scaled."""
        return [self.read(image) for image in self.images.of_sample(number)]

    def read(self, image: int) -> tuple[Tensor, Tensor]:
        """Raises DataError if it is not what was written."""
        shard, row = divmod(image, self._facts["images_per_shard"])
        try:
            file = self._open(shard)
            features = file.get_slice("features")[row]
            is_scaled = self._facts["storage"] == "int8"
            scales = file.get_slice("scales")[row] if is_scaled else torch.zeros(len(features), 0)
            expected = int(file.get_slice("checksums")[row])
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.folder / shard_name(shard)}: {error}. Mend it: {self._mend}") from None
        if checksum(self._facts["digest"], image, features, scales) != expected:
            raise DataError(
                f"{self.folder / shard_name(shard)}: the features of image {image} "
                f"({self.images.names[image]}) are not those that were written. Mend it: {self._mend}"
            )
        return features, scales

    @property
    def _facts(self) -> dict[str, Any]:
        assert self._manifest is not None  # refused above
        return self._manifest

    @cached_property
    def _files(self) -> dict[int, Any]:
        return {}

    def _open(self, shard: int) -> Any:
        """Opened when first read, in each process: a worker may be a copy that cannot take open files."""
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / shard_name(shard), "pt").__enter__()
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_files"}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def checksum(digest: str, image: int, features: Tensor, scales: Tensor) -> int:
    """Of the values and of their place: another cache's shard, or another shard's name, is seen too."""
    value = zlib.crc32(f"{digest} {image}".encode())
    for tensor in (features, scales):
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where none was written."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Delete it and build the cache again.") from None
    return manifest


def shard_problems(folder: Path, manifest: dict[str, Any]) -> Sequence[str]:
    """A sentence for every shard that is missing or has another size."""
    problems = []
    for number, shard in enumerate(manifest["shards"]):
        path = folder / shard_name(number)
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            problems.append(f"{path.name} is missing.")
        elif found != shard["bytes"]:
            problems.append(f"{path.name} has {found} bytes; {shard['bytes']} were written.")
    return problems
