"""Builds a feature cache, shard after shard: each is whole or not there, so that a kill costs one."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morebench.data.features import MANIFEST, checksum, read_manifest, shard_name
from morebench.errors import DataError, Interrupted, NonFiniteError
from morebench.models.features import to_8bit
from morebench.models.parts import save_tensors
from morebench.progress import Progress, track
from morebench.training.feature_encoder import Encode, ImageGroups, loader
from morebench.training.features import CacheOf
from morebench.training.files import disk_full_named, sha256, write_atomically
from morebench.training.signals import StopRequest

SHARD_BYTES = 2**30
_JOURNAL = "shards.jsonl"  # a line per finished shard; the manifest is made of it


def built_bytes(cache: CacheOf) -> int:
    """What finished shards already take."""
    journal = _Journal(cache.folder)
    return sum(journal.shards[number]["bytes"] for number in journal.present())


def build_cache(
    cache: CacheOf,
    dataset: ImageGroups,
    encode: Encode,
    *,
    per_call: int,
    num_workers: int,
    stop: StopRequest,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write what is missing of the cache; returns how many shards that were.

    A complete cache is read once, and what was damaged of it written anew. The caller holds the folder's
    lock. Raises DataError, DiskFullError, Interrupted, NonFiniteError.
    """
    folder, num_images = cache.folder, len(dataset.images)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp-*"):  # of killed builders
        leftover.unlink()
    journal = _Journal(folder)
    per_shard = journal.begin(max(1, shard_bytes // cache.image_bytes), cache.digest)
    shards = range(math.ceil(num_images / per_shard))
    whole = journal.present()
    if len(whole) == len(shards) and _is_complete(folder):
        whole -= _damaged(folder, journal)
    todo = [number for number in shards if number not in whole]
    if todo:
        (folder / MANIFEST).unlink(missing_ok=True)
        ranges = {n: range(n * per_shard, min((n + 1) * per_shard, num_images)) for n in shards}
        done = sum(len(ranges[number]) for number in whole)
        with Progress(f"features of {cache.name}", num_images, done) as progress:
            _Builder(cache, journal, dataset, encode, stop, progress, done).build(
                [(number, ranges[number]) for number in todo], per_call, num_workers
            )
    if todo or not _is_complete(folder):
        manifest = {
            "digest": cache.digest,
            "facts": json.loads(cache.facts_text),
            "storage": cache.storage,
            "num_images": num_images,
            "images_per_shard": per_shard,
            "shards": [journal.shards[number] for number in shards],
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return len(todo)


class _Builder:
    """The encoder works on a shard while the one before is written."""

    def __init__(
        self,
        cache: CacheOf,
        journal: "_Journal",
        dataset: ImageGroups,
        encode: Encode,
        stop: StopRequest,
        progress: Progress,
        done: int,
    ) -> None:
        self._cache, self._journal, self._dataset, self._encode = cache, journal, dataset, encode
        self._stop, self._progress, self._done = stop, progress, done

    def build(self, todo: Sequence[tuple[int, range]], per_call: int, num_workers: int) -> None:
        # groups begin with a shard, so that a resumed one is computed in the same groups
        groups = [
            tuple(numbers[at : at + per_call])
            for _, numbers in todo
            for at in range(0, len(numbers), per_call)
        ]
        pixels = iter(loader(self._dataset, groups, num_workers))
        with ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            try:
                for shard, numbers in todo:
                    features = self._features(pixels, numbers, per_call)
                    if pending is not None:
                        pending.result()
                    pending = writer.submit(self._write, shard, numbers, features)
            finally:  # what is computed is kept, also where the next shard failed
                if pending is not None:
                    pending.result()

    def _features(self, pixels: Iterator[Tensor], numbers: range, per_call: int) -> Tensor:
        """`[n, V, C]` of a whole shard, on the CPU."""
        cache = self._cache
        features = torch.empty(len(numbers), cache.num_visual_tokens, cache.feature_dim, dtype=cache.dtype)
        for at in range(0, len(numbers), per_call):
            if self._stop.signal_name is not None:
                raise Interrupted(
                    f"{self._stop.signal_name} asked to stop. Finished shards are kept: the same command "
                    "goes on."
                )
            found = self._encode(next(pixels))
            features[at : at + len(found)] = found
            self._done += len(found)
            self._progress.update(self._done)
        if not torch.isfinite(features).all():
            (bad,) = torch.nonzero(~features.isfinite().all(-1).all(-1), as_tuple=True)
            raise NonFiniteError(
                f"The vision encoder gave features that are not finite for {len(bad)} images, the first of "
                f"them {self._dataset.images.names[numbers[int(bad[0])]]}. Nothing of this shard was written."
            )
        return features

    def _write(self, shard: int, numbers: range, features: Tensor) -> None:
        scales = torch.zeros(*features.shape[:2], 0)
        if self._cache.is_8bit:
            features, scales = to_8bit(features)
        checksums = [
            checksum(self._cache.digest, *row) for row in zip(numbers, features, scales, strict=True)
        ]
        tensors = {"features": features, "checksums": torch.tensor(checksums)}
        if self._cache.is_8bit:
            tensors["scales"] = scales
        path = self._cache.folder / shard_name(shard)
        with disk_full_named(path, "Finished shards are kept"):
            save_tensors(tensors, path)
            self._journal.note(shard, path, len(numbers))


class _Journal:
    """Which shards are finished. A line that a kill tore is no line."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / _JOURNAL
        self.shards: dict[int, dict[str, Any]] = {}
        self._layout: dict[str, Any] = {}
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "images_per_shard" in entry:
                self._layout = entry
            else:
                self.shards[entry.pop("shard")] = entry

    def begin(self, images_per_shard: int, digest: str) -> int:
        """Images in a shard: as it was begun, should the default have changed since."""
        if not self._layout:
            self._layout = {"images_per_shard": images_per_shard, "digest": digest}
            self._append(self._layout)
        elif self._layout["digest"] != digest:
            raise DataError(
                f"{self._path} is of cache {self._layout['digest']}, not of {digest}. Delete {self._folder}."
            )
        per_shard: int = self._layout["images_per_shard"]
        return per_shard

    def note(self, shard: int, path: Path, num_images: int) -> None:
        entry = {"images": num_images, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self._append({"shard": shard, **entry})
        self.shards[shard] = entry

    def present(self) -> set[int]:
        """Finished shards whose file is there in its size."""
        files = {number: self._folder / shard_name(number) for number in self.shards}
        return {
            number
            for number, path in files.items()
            if path.is_file() and path.stat().st_size == self.shards[number]["bytes"]
        }

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(f"\n{json.dumps(entry)}\n")  # ends a line that a killed process tore
            file.flush()
            os.fsync(file.fileno())


def _is_complete(folder: Path) -> bool:
    return read_manifest(folder) is not None


def _damaged(folder: Path, journal: _Journal) -> set[int]:
    """Shards whose content is not what was written. Reads them all."""
    numbers = sorted(journal.shards)
    return {
        number
        for number in track(numbers, f"verifying {folder.name}")
        if sha256(folder / shard_name(number)) != journal.shards[number]["sha256"]
    }
