"""Records and images of one data set -> findings, quarantine list, manifest, pictures."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from morebench.config.schema import Paths, TrainingData
from morebench.data import checked
from morebench.data.aside import remove_leftovers, replace_text
from morebench.data.checked import CheckedData, Manifest
from morebench.data.checking import looks, pictures
from morebench.data.checking.lengths import character_facts, token_facts
from morebench.data.findings import Finding, Kind
from morebench.data.image_folder import ImageFolder
from morebench.data.index import LengthIndex
from morebench.data.once import alone
from morebench.data.store import RecordStore, open_records
from morebench.errors import ConfigError, DataError, join_problems

Measure = Callable[[CheckedData], LengthIndex]


@dataclass(frozen=True)
class Checked:
    data: CheckedData
    num_looked_at: int  # images that were read now
    problems: list[str]  # why token lengths could not be measured


def check_data(
    data: TrainingData,
    paths: Paths,
    workers: int,
    say: Callable[[str], None],
    measures: Mapping[str, Measure] | None = None,
    again: bool = False,
) -> Checked:
    """Write everything to `checked.check_folder`, manifest.json last. One check of a data set at a time.

    workers, again: see `looks.look_at_all`. measures: what for -> the token lengths of the samples that are
    left. Raises DataError where there is no data set, or where its file ends in the middle; ConfigError for
    an `also_quarantine` that is no kind.
    """
    folder = Path(paths.data) / data.folder
    _check_folder(folder, data)
    _also(data)
    out = checked.check_folder(data, paths)
    with alone(out):
        return _check(data, paths, folder, out, workers, say, measures or {}, again)


def _check(
    data: TrainingData,
    paths: Paths,
    folder: Path,
    out: Path,
    workers: int,
    say: Callable[[str], None],
    measures: Mapping[str, Measure],
    again: bool,
) -> Checked:
    records_path = folder / data.records
    records = {"size": -1, "mtime_ns": -1}
    if records_path.exists():  # else the next line says so
        records = {"size": records_path.stat().st_size, "mtime_ns": records_path.stat().st_mtime_ns}
    store = open_records(records_path, Path(paths.cache), say)
    names = store.image_names()
    if names and not (folder / data.images).is_dir():
        raise DataError(
            f"{folder / data.images}: no such folder; expected the {len(names):,} images that "
            f"{records_path} names."
        )
    images = ImageFolder(folder / data.images, data.allowed_links)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    before = checked.read_manifest(out)
    table, num_looked_at = looks.look_at_all(names, images, out, workers, again=again)
    bad, kept, kept_counts = _findings(store, names, table, _also(data))
    numbers = [finding.record for finding in bad]
    samples = checked.without(store, numbers)
    manifest = Manifest(
        version=checked.VERSION,
        label=data.label,
        records={**records, "sha256": store.sha256},
        also_quarantine=sorted(data.also_quarantine),
        allowed_links=sorted(data.allowed_links),
        num_records=store.num_records,
        num_samples=len(samples),
        num_images=len(names),
        image_bytes=int(np.maximum(table.column("size").to_numpy(), 0).sum()),
        quarantined=_counted(finding.kind for finding in bad),
        kept=kept_counts,
        content_hash=checked.content_hash(store.sha256, names, _digests(table), numbers),
        quarantine_sha256="",
        images_sha256="",
        checked=datetime.now(UTC).isoformat(timespec="seconds"),
        characters=character_facts(samples),
    )
    tokens, problems = _measured(CheckedData(samples, images, out, manifest), measures)
    if before is not None and before.content_hash == manifest.content_hash:
        tokens = {**before.tokens, **tokens}  # of the same samples
    pictures.draw_lengths(replace(manifest, tokens=tokens), out / pictures.LENGTHS)
    suspicious = [finding for finding in [*bad, *kept] if finding.image is not None]
    pictures.draw_suspicious(suspicious, images, out / pictures.SUSPICIOUS)
    # what is replaced from here on, the manifest of before does not fit any more
    looks.write_table(table, out)
    replace_text(out / checked.QUARANTINE, _lines(bad))
    replace_text(out / checked.FINDINGS, _lines(kept))
    manifest = replace(
        manifest,
        tokens=tokens,
        quarantine_sha256=checked.hash_of(out / checked.QUARANTINE),
        images_sha256=checked.hash_of(out / looks.TABLE),
    )
    checked.write_manifest(manifest, out)
    looks.remove_parts(out)
    return Checked(CheckedData(samples, images, out, manifest), num_looked_at, problems)


def _measured(
    data: CheckedData, measures: Mapping[str, Measure]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Facts of the token lengths, and why some could not be measured."""
    facts, problems = {}, []
    for name, measure in measures.items() if len(data.samples) else ():
        try:
            facts[name] = token_facts(measure(data))
        except DataError as error:
            problems.append(f"{name}: {error}")
    return facts, problems


def _check_folder(folder: Path, data: TrainingData) -> None:
    wanted = f"expected {data.records} and {data.images}/ of {data.label} there"
    if data.build is not None and not folder.exists():
        raise DataError(f"{folder}: not built yet; `python -m morebench.train` builds it and checks it then.")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {wanted}. Put the data there or set paths.data.")
    if not any(folder.iterdir()):
        mend = (
            "Delete the folder to have it built again"
            if data.build
            else "Put the data there or set paths.data"
        )
        raise DataError(f"{folder}: the folder is empty; {wanted}. {mend}.")


def _also(data: TrainingData) -> set[Kind]:
    known = [kind.name for kind in Kind if not kind.quarantines]
    problems = [
        f"also_quarantine of {data.label}: {name!r} is not one of {', '.join(known)}."
        + "".join(f" Did you mean {near}?" for near in get_close_matches(name, known, n=1))
        for name in data.also_quarantine
        if name not in known
    ]
    if problems:
        raise ConfigError(join_problems(problems))
    return {Kind[name] for name in data.also_quarantine}


def _findings(
    store: RecordStore, names: Sequence[str], table: pa.Table, also: set[Kind]
) -> tuple[list[Finding], list[Finding], dict[str, int]]:
    """What is quarantined, one finding a record; what is kept, one an image or id; kept records by kind."""
    found = {finding.record: finding for finding in store.findings}
    odd: list[Finding] = []
    of_image = _kinds_of_images(names, table)
    for row in store.rows_with_image(list(of_image)):
        sample, (record, offset) = store[row], store.record_of(row)
        own = [
            Finding(kind, reason, record, offset, sample.id, image)
            for image in dict.fromkeys(sample.images)
            for kind, reason in of_image.get(image, ())
        ]
        unusable = [finding for finding in own if finding.kind.quarantines or finding.kind in also]
        if unusable:
            found.setdefault(record, unusable[0])
        else:
            odd += own
    left = checked.without(store, found)  # an id repeats only among records that are left
    for number in left.duplicate_ids().tolist():
        (record, offset), record_id = left.record_of(number), left[number].id
        finding = Finding(Kind.duplicate_id, "an earlier record has this id", record, offset, record_id)
        if Kind.duplicate_id in also:
            found[record] = finding
        else:
            odd.append(finding)
    odd = [finding for finding in odd if finding.record not in found]
    counts = Counter(kind for kind, _ in {(finding.kind, finding.record) for finding in odd})
    kept: dict[tuple[Kind, str | int], Finding] = {}
    for finding in odd:
        kept.setdefault((finding.kind, finding.image or finding.record), finding)
    in_order = sorted(found.values(), key=lambda finding: finding.record)
    return in_order, list(kept.values()), _counted(counts.elements())


def _kinds_of_images(names: Sequence[str], table: pa.Table) -> dict[str, list[tuple[Kind, str]]]:
    """Of the images on which something was found."""
    kinds = table.column("kind").to_pylist()
    reasons = table.column("reason").to_pylist()
    odd = table.column("odd").to_pylist()
    return {
        name: [(Kind[kind], reason)] if kind else [(Kind[one["kind"]], one["reason"]) for one in some]
        for name, kind, reason, some in zip(names, kinds, reasons, odd, strict=True)
        if kind or some
    }


def _digests(table: pa.Table) -> Iterable[bytes]:
    return (digest.as_py() for digest in table.column("sha256"))


def _counted(kinds: Iterable[Kind]) -> dict[str, int]:
    """In the order of `Kind`."""
    counts = Counter(kinds)
    return {kind.name: counts[kind] for kind in Kind if counts[kind]}


def _lines(findings: Iterable[Finding]) -> str:
    return "".join(json.dumps(asdict(finding) | {"kind": finding.kind.name}) + "\n" for finding in findings)
