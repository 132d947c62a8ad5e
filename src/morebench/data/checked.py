"""What `morebench.data check` has written about a data set, opened for planning and training. No torch."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from morebench.config.schema import Paths, TrainingData
from morebench.data.aside import replace_text
from morebench.data.checking.looks import FACTS, TABLE, facts_now, read_table
from morebench.data.findings import Finding, Kind
from morebench.data.image_folder import ImageFolder
from morebench.data.images import read_image
from morebench.data.store import RecordStore, open_records
from morebench.errors import DataError, join_problems

VERSION = 2
MANIFEST, QUARANTINE, FINDINGS = "manifest.json", "quarantine.jsonl", "findings.jsonl"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a check."""

    version: int
    label: str
    records: dict[str, Any]  # size, mtime_ns and sha256 of the file
    also_quarantine: list[str]
    allowed_links: list[str]
    num_records: int
    num_samples: int  # records that are not quarantined
    num_images: int  # distinct
    image_bytes: int
    quarantined: dict[str, int]  # kind -> records; a record counts under the first kind found
    kept: dict[str, int]  # kind -> records
    content_hash: str  # records, images and what is quarantined; not where they lie
    quarantine_sha256: str  # of quarantine.jsonl
    images_sha256: str  # of images.arrow
    checked: str  # when, UTC
    characters: dict[str, Any]  # of the samples' texts: a histogram
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)  # per LLM, encoder and step

    @property
    def num_quarantined(self) -> int:
        return self.num_records - self.num_samples

    @property
    def quarantined_share(self) -> float:
        return self.num_quarantined / self.num_records


class Status(Enum):
    absent = "absent"  # there is no records file
    unchecked = "not checked"
    stale = "stale"
    checked = "checked"


@dataclass(frozen=True)
class DataState:
    data: TrainingData
    status: Status
    reason: str  # a clause; empty if checked
    manifest: Manifest | None = None


@dataclass(frozen=True, eq=False)
class CheckedData:
    samples: RecordStore  # without the quarantined ones
    images: ImageFolder
    folder: Path  # of the check
    manifest: Manifest

    @property
    def content_hash(self) -> str:
        return self.manifest.content_hash

    def read_images(self, number: int) -> list[bytes]:
        """The files of a sample. Raises DataError."""
        sample = self.samples[number]
        try:
            numbers = self.samples.image_numbers(number)
            return [self.read_image(name, one) for name, one in zip(sample.images, numbers, strict=True)]
        except DataError as error:
            raise DataError(f"record id {sample.id!r}: {error}") from None

    def read_image(self, name: str, number: int) -> bytes:
        """Image `number` of `samples.image_names()`, byte for byte the file that was checked."""
        try:
            content = read_image(self.images.path(name))
        except DataError as error:
            raise DataError(f"image {name}: {error}") from None
        if sha256(content).digest() != self._digests[number].as_py():
            raise DataError(
                f"image {name} is not the file that was checked. Run `python -m morebench.data check` again; "
                "again=true reads files that have kept their size and times too."
            )
        return content

    def changed_images(self) -> list[str]:
        """Usable images whose file has not the size and time that it had when it was checked."""
        names = self.samples.image_names()
        columns = FACTS[:2]  # a link to a file or another mode of it changes the last
        then = np.stack([self._table.column(key).to_numpy() for key in columns], axis=1)
        usable = self._table.column("kind").is_null().to_numpy()
        changed = usable & (facts_now(self.images, names)[:, : len(columns)] != then).any(axis=1)
        return [names[number] for number in np.flatnonzero(changed)]

    @cached_property
    def _table(self) -> pa.Table:
        """Raises DataError where it is not the one that was written with the manifest."""
        table = read_table(self.folder / TABLE)
        if table is None or hash_of(self.folder / TABLE) != self.manifest.images_sha256:
            raise DataError(
                f"{self.folder / TABLE} is not what the check of {self.manifest.label} wrote: damaged, or "
                "the data was checked once more since. Start again; if that does not help, check again."
            )
        return table

    @cached_property
    def _digests(self) -> pa.Array:
        return self._table.column("sha256").combine_chunks()

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the files anew."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_digests", "_table")}


def check_folder(data: TrainingData, paths: Paths) -> Path:
    """Below paths.checks, wherever the data lies."""
    parts = PurePosixPath(data.folder, data.records).with_suffix("").parts
    return Path(paths.checks, *("up" if part == ".." else part.strip("/") for part in parts))


def data_state(data: TrainingData, paths: Paths) -> DataState:
    """Whether the check that was made still holds, as far as that can be told without asking every image."""
    records = Path(paths.data) / data.folder / data.records
    try:
        stat = records.stat()
    except OSError:
        return DataState(data, Status.absent, f"{records} does not exist")
    manifest = read_manifest(check_folder(data, paths))
    if manifest is None:
        return DataState(data, Status.unchecked, f"{records} has not been checked")
    if (manifest.records["size"], manifest.records["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
        return DataState(data, Status.stale, f"{records} has changed since it was checked", manifest)
    for key in ("also_quarantine", "allowed_links"):
        now, then = sorted(getattr(data, key)), sorted(getattr(manifest, key))
        if now != then:
            return DataState(
                data, Status.stale, f"{records} was checked with {key}={then}, not {now}", manifest
            )
    return DataState(data, Status.checked, "", manifest)


def usability_problems(
    manifest: Manifest, data: TrainingData, paths: Paths, max_quarantined: float
) -> Iterator[str]:
    """Why no cell should be trained on data of which everything is known."""
    if data.num_samples is not None and manifest.num_records != data.num_samples:
        yield (
            f"{data.label}: {manifest.num_records:,} records; published are {data.num_samples:,}. Fetch the "
            "published file again, or set num_samples of the data choice to what you mean to train on."
        )
    if manifest.num_samples == 0:
        yield f"{data.label}: all records are quarantined: {told(manifest.quarantined)}."
    elif manifest.quarantined_share > max_quarantined:
        yield (
            f"{data.label}: {manifest.num_quarantined:,} of {manifest.num_records:,} records "
            f"({manifest.quarantined_share:.2%}) are quarantined, more than max_quarantined="
            f"{max_quarantined:g}: {told(manifest.quarantined)}. Mend what "
            f"{check_folder(data, paths) / QUARANTINE} lists and check again, or raise max_quarantined. "
            f"The first: {_first(check_folder(data, paths) / QUARANTINE)}"
        )


def changed_images_problem(data: TrainingData, changed: Sequence[str]) -> str:
    return (
        f"{data.label}: {len(changed):,} images are not the files that were checked: "
        f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}. "
        "Run `python -m morebench.data check` again."
    )


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {Kind[kind].value}" for kind, count in counts.items())


def _first(path: Path) -> str:
    with path.open() as file:
        entry = json.loads(file.readline())
    return str(Finding(**entry | {"kind": Kind[entry["kind"]]}))


def open_checked(data: TrainingData, paths: Paths, max_quarantined: float = 1.0) -> CheckedData:
    """Raises DataError where the check is missing or stale, and where it found too much."""
    state = data_state(data, paths)
    if state.manifest is None or state.status is not Status.checked:
        raise DataError(f"{data.label}: {state.reason}. Run `python -m morebench.data check`.")
    if problems := list(usability_problems(state.manifest, data, paths, max_quarantined)):
        raise DataError(join_problems(problems))
    records, folder = Path(paths.data) / data.folder, check_folder(data, paths)
    samples = open_records(records / data.records, Path(paths.cache))
    if samples.sha256 != state.manifest.records["sha256"]:
        raise DataError(f"{data.label}: its records have changed. Run `python -m morebench.data check`.")
    quarantined = [json.loads(line)["record"] for line in (folder / QUARANTINE).read_text().splitlines()]
    images = ImageFolder(records / data.images, data.allowed_links)
    opened = CheckedData(without(samples, quarantined), images, folder, state.manifest)
    assert opened._digests is not None  # mapped now: a check that is made meanwhile replaces the file
    return opened


def without(samples: RecordStore, quarantined: Iterable[int]) -> RecordStore:
    """`quarantined` are numbers of records; those that are no samples anyway are not in the store."""
    rows = np.flatnonzero(np.isin(samples.records, list(quarantined)))
    return samples.without(rows.tolist()) if len(rows) else samples


def content_hash(
    records_sha256: str, names: Sequence[str], digests: Iterable[bytes], quarantined: Sequence[int]
) -> str:
    """`digests` of the images `names`; `quarantined` are numbers of records, ascending."""
    digest = sha256(bytes.fromhex(records_sha256))
    for name, image in zip(names, digests, strict=True):
        digest.update(f"{name}\0{image.hex()}\n".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(list(quarantined)).encode())
    return digest.hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Last of what a check writes: with it, the check is done."""
    replace_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """None while there is none, and for one that is damaged, of another version, or not in one piece."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_bytes()))
        whole = hash_of(folder / QUARANTINE) == manifest.quarantine_sha256
        return manifest if manifest.version == VERSION and whole and (folder / TABLE).exists() else None
    except (OSError, ValueError, TypeError):
        return None
