"""Opens a training data set: every record parsed, every image decoded once, the content hashed.

What was learnt about the images is kept in a manifest, so that the next call only asks for their sizes and
times. Neither torch nor an LLM is needed: `plan` and `check` run this on a login node.
"""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from morebench.config.schema import ImagePolicy, Paths, TrainingData
from morebench.data.image_folder import ImageFolder
from morebench.data.images import decode_image, read_image
from morebench.data.store import RecordStore, open_records
from morebench.errors import DataError, join_problems

MANIFEST_VERSION = 1
CHUNK = 64  # images per task of the thread pool
KEEP_FROM = 10_000  # after an error, a manifest is worth writing only where checking again takes long


@dataclass(frozen=True)
class Quarantined:
    id: str
    image: str
    reason: str


@dataclass(frozen=True)
class CheckedData:
    samples: RecordStore  # without the quarantined ones
    images: ImageFolder
    content_hash: str  # records, images and what is quarantined; not where they lie
    num_records: int
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class _Image:
    """What is known of a file of this size and time."""

    size: int
    mtime_ns: int
    sha256: str
    problem: str | None


def open_data(data: TrainingData, paths: Paths, policy: ImagePolicy) -> CheckedData:
    """Raises DataError naming all bad records, or all bad images."""
    folder = Path(paths.data) / data.folder
    _check_folder(folder, data)
    records_path, images_root = folder / data.records, folder / data.images
    images = ImageFolder(images_root, data.allowed_links)
    samples = open_records(records_path, Path(paths.cache))
    if samples.findings:
        head = f"{records_path}: {len(samples.findings)} of {samples.num_records} records cannot be used:"
        raise DataError(f"{head}\n{join_problems(map(str, samples.findings))}")
    if data.num_samples is not None and samples.num_records != data.num_samples:
        raise DataError(
            f"{records_path}: {samples.num_records} records; {data.label} has {data.num_samples}. "
            "Fetch the published file again, or set num_samples in its config to what you mean to train on."
        )
    names = _image_names(samples, images, records_path)
    if names and not images_root.is_dir():
        raise DataError(
            f"{images_root}: no such folder; expected the {len(names)} images that {records_path} names."
        )
    manifest = (
        Path(paths.cache) / "data" / f"{sha256(str(images_root.resolve()).encode()).hexdigest()[:16]}.json"
    )
    known = _load_manifest(manifest)
    found = _look_at(names, images_root, known)
    bad = _bad_samples(samples, found)
    if not bad or policy is ImagePolicy.quarantine or len(names) >= KEEP_FROM:
        _save_manifest(manifest, known, found)
    if bad and policy is ImagePolicy.error:
        raise _bad_images_error(bad, len(samples), records_path, images_root)
    if len(bad) == len(samples):
        raise DataError(
            f"{records_path}: all samples are quarantined; no image in {images_root} can be used."
        )
    return CheckedData(
        samples=samples.without(list(bad)) if bad else samples,
        images=images,
        content_hash=_content_hash(samples.sha256, found, bad),
        num_records=samples.num_records,
        quarantined=tuple(bad.values()),
    )


def peek_hash(data: TrainingData, paths: Paths, policy: ImagePolicy) -> str | None:
    """The content hash; None while there is no records file."""
    if not (Path(paths.data) / data.folder / data.records).exists():
        return None
    return open_data(data, paths, policy).content_hash


def _check_folder(folder: Path, data: TrainingData) -> None:
    wanted = f"expected {data.records} and {data.images}/ of {data.label} there"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {wanted}. Put the data there or set paths.data.")
    if not any(folder.iterdir()):
        mend = (
            "Delete the folder to have it built again"
            if data.build
            else "Put the data there or set paths.data"
        )
        raise DataError(f"{folder}: the folder is empty; {wanted}. {mend}.")


def _image_names(samples: RecordStore, images: ImageFolder, records_path: Path) -> list[str]:
    """Each image once, in the order of the records; none outside the folder."""
    names = samples.image_names()
    problems = {}
    for name in names:
        try:
            images.path(name)
        except DataError as error:
            problems[name] = error
    if problems:
        raise DataError(
            join_problems(
                f"{records_path}: record {number} (id {samples[number].id!r}): {problems[image]}"
                for number in samples.rows_with_image(list(problems))
                for image in samples[number].images
                if image in problems
            )
        )
    return names


def _look_at(names: Sequence[str], root: Path, known: dict[str, _Image]) -> dict[str, _Image]:
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]

    def look(chunk: Sequence[str]) -> list[_Image]:
        return [_look(root / name, known.get(name)) for name in chunk]

    with ThreadPoolExecutor() as pool:  # hashing and decoding leave Python's lock
        images = (image for chunk in pool.map(look, chunks) for image in chunk)
        return dict(zip(names, images, strict=True))


def _look(path: Path, known: _Image | None) -> _Image:
    try:
        stat = path.stat()
        if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return known
        content = read_image(path)
    except (OSError, DataError) as error:
        return _Image(-1, -1, "", f"{error.strerror}." if isinstance(error, OSError) else str(error))
    digest = sha256(content).hexdigest()
    try:
        decode_image(content)
    except DataError as error:
        return _Image(stat.st_size, stat.st_mtime_ns, digest, str(error))
    return _Image(stat.st_size, stat.st_mtime_ns, digest, None)


def _bad_samples(samples: RecordStore, found: dict[str, _Image]) -> dict[int, Quarantined]:
    """By the number of the sample; ids repeat in published data."""
    problems = {name: image.problem for name, image in found.items() if image.problem is not None}
    bad = {}
    for number in samples.rows_with_image(list(problems)):
        sample = samples[number]
        name = next(name for name in sample.images if name in problems)
        bad[number] = Quarantined(sample.id, name, problems[name])
    return bad


def _bad_images_error(
    bad: dict[int, Quarantined], num_samples: int, records_path: Path, root: Path
) -> DataError:
    mend = "Mend it, or set on_bad_image=quarantine to leave such samples out of every cell."
    lines = [
        f"{records_path}: record {number} (id {sample.id!r}): image {root / sample.image}: {sample.reason}"
        for number, sample in bad.items()
    ]
    if len(lines) == 1:
        return DataError(f"{lines[0]} {mend}")
    head = f"{len(bad)} of {num_samples} records have an image that cannot be used. {mend}"
    return DataError(f"{head}\n{join_problems(lines)}")


def _content_hash(records_sha256: str, found: dict[str, _Image], bad: Iterable[int]) -> str:
    digest = sha256(bytes.fromhex(records_sha256))
    for name, image in found.items():
        digest.update(f"{name}\0{image.sha256}\n".encode())
    digest.update(json.dumps(list(bad)).encode())
    return digest.hexdigest()


def _load_manifest(path: Path) -> dict[str, _Image]:
    try:
        stored = json.loads(path.read_bytes())
        if stored["version"] != MANIFEST_VERSION:
            return {}
        return {name: _Image(*fields) for name, fields in stored["images"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent, or damaged: looked at anew


def _save_manifest(path: Path, known: dict[str, _Image], found: dict[str, _Image]) -> None:
    images = known | {name: image for name, image in found.items() if image.size >= 0}
    if images == known:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".tmp-{os.getpid()}")
    stored = {name: [i.size, i.mtime_ns, i.sha256, i.problem] for name, i in images.items()}
    aside.write_text(json.dumps({"version": MANIFEST_VERSION, "images": stored}))
    aside.replace(path)
