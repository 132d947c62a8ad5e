"""From sources to a data folder: records, images and a manifest, made aside and renamed."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from morebench.data.subset.draw import Draw, draw
from morebench.data.subset.drops import Drop
from morebench.data.subset.instructions import human_turn
from morebench.data.subset.look import Looker
from morebench.data.subset.ranking import Candidate
from morebench.data.subset.scan import Scanned, scan
from morebench.data.subset.shards import Source
from morebench.errors import ConfigError, DataError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Request:
    folder: Path
    records: str  # file in `folder`
    images: str  # folder in `folder`
    sources: tuple[Source, ...]
    n: int
    seed: int
    arguments: dict[str, Any]  # as given, for the manifest


def shares(n: int, num_sources: int) -> list[int]:
    """Equal parts; what is left over goes to the first ones."""
    return [n // num_sources + (number < n % num_sources) for number in range(num_sources)]


def build(request: Request, workers: int) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether the subset was there already.

    What a killed build found lies in `<folder>.building`; the next call uses it and ends in the same bytes.
    Raises ConfigError for a folder with something else in it, DataError for too few usable samples.
    """
    work = request.folder.with_name(f"{request.folder.name}.building")
    if request.folder.exists():
        manifest = _manifest_there(request)
        shutil.rmtree(work, ignore_errors=True)
        return manifest, True
    scans = [scan(source, request.seed, work / "shards", workers) for source in request.sources]
    out, spare = work / "out", work / "spare"
    images = out / request.images
    for folder in (images, spare, (out / request.records).parent):
        folder.mkdir(parents=True, exist_ok=True)
    draws = [Draw(wanted) for wanted in shares(request.n, len(scans))]
    with RecordWriter(out / request.records) as writer:
        taken: set[str] = set()
        for source, scanned, one in zip(request.sources, scans, draws, strict=True):
            prefix = f"{source.name}_" if len(scans) > 1 else ""

            def take(candidate: Candidate, image: str, prefix: str = prefix) -> None:
                writer.write(candidate, image, prefix)

            looker = Looker(source, images, spare)
            journals = work / "looked" / _place_name(source)
            taken |= draw(scanned, looker, journals, one, taken, take, workers, source.name)
    _check_enough(request, scans, draws)
    _remove_surplus(images, writer.images)
    manifest = _manifest(request, scans, draws, writer)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    out.rename(request.folder)
    shutil.rmtree(work)
    return manifest, False


def _place_name(source: Source) -> str:
    """Another image folder means that all has to be looked at again."""
    return sha256(str(source.images and source.images.resolve()).encode()).hexdigest()[:16]


class RecordWriter:
    """A JSON list with one record a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = sha256()
        self.images: set[str] = set()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._put(b"\n]\n" if self.images else b"[]\n")
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, candidate: Candidate, image: str, prefix: str) -> None:
        record = {
            "id": prefix + candidate["id"],
            "image": image,
            "conversations": [
                {"from": "human", "value": human_turn(candidate["rest"])},
                {"from": "gpt", "value": candidate["caption"]},
            ],
        }
        self._put(b",\n" if self.images else b"[\n")
        self._put(json.dumps(record, ensure_ascii=False).encode())
        self.images.add(image)

    def _put(self, content: bytes) -> None:
        self._digest.update(content)
        self._file.write(content)


def _manifest_there(request: Request) -> dict[str, Any]:
    try:
        manifest = json.loads((request.folder / MANIFEST).read_bytes())
        if manifest["arguments"] == request.arguments:
            return dict(manifest)
        found = (
            f"a subset built with {json.dumps(manifest['arguments'])}, not {json.dumps(request.arguments)}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        found = f"no subset with a {MANIFEST} of this command"
    raise ConfigError(
        f"{request.folder} exists and holds {found}. Move it away, or name another folder below paths.data: "
        "pretrain_data.folder=NAME"
    )


def _check_enough(request: Request, scans: Sequence[Sequence[Scanned]], draws: Sequence[Draw]) -> None:
    lines = [
        f"{source.name}: {one.num_taken} of {one.wanted} samples, out of "
        f"{sum(shard.num_candidates for shard in scanned)} candidates. Left out: "
        + (tell(_early(scanned) | names(one.drops)) or "none")
        for source, scanned, one in zip(request.sources, scans, draws, strict=True)
        if one.num_taken < one.wanted
    ]
    if not lines:
        return
    # k sources share n as evenly as can be: the source at place i can fill its part up to k * taken + i
    usable = min(len(draws) * one.num_taken + place for place, one in enumerate(draws))
    advice = (
        f"Give more shards or images, or ask for less: n={usable} is there" if usable else "Give other shards"
    )
    raise DataError("\n".join(["too few usable samples.", *lines, advice + "."]))


def tell(drops: dict[str, int]) -> str:
    return ", ".join(f"{count} {Drop[name].value}" for name, count in drops.items())


def names(drops: dict[Drop, int]) -> dict[str, int]:
    return {reason.name: drops[reason] for reason in Drop if drops[reason]}


def _early(scanned: Sequence[Scanned]) -> dict[str, int]:
    """What was left out before any image was looked at."""
    found = {reason.name: sum(one.drops.get(reason.name, 0) for one in scanned) for reason in Drop}
    return {name: count for name, count in found.items() if count}


def _remove_surplus(images: Path, wanted: set[str]) -> None:
    """Images of the last chunk behind the last sample taken, and of duplicates."""
    for folder, _, files in os.walk(images, topdown=False):
        relative = Path(folder).relative_to(images)
        for name in files:
            if (relative / name).as_posix() not in wanted:
                (images / relative / name).unlink()
        if Path(folder) != images and not os.listdir(folder):
            os.rmdir(folder)


def _manifest(
    request: Request, scans: Sequence[Sequence[Scanned]], draws: Sequence[Draw], writer: RecordWriter
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "arguments": request.arguments,
        "records": {"file": request.records, "count": request.n, "sha256": writer.sha256},
        "sources": {
            source.name: {
                "rows": sum(shard.num_rows for shard in scanned),
                "left_out_before_ranking": _early(scanned),
                "candidates": sum(shard.num_candidates for shard in scanned),
                "looked_at": one.num_looked_at,
                "left_out": names(one.drops),
                "taken": one.num_taken,
                "shards": [
                    {
                        "name": shard.shard.name,
                        "bytes": shard.shard.size,
                        "rows": shard.num_rows,
                        "candidates": shard.num_candidates,
                        "columns": shard.used,
                    }
                    | ({"damage": shard.damage} if shard.damage else {})
                    for shard in scanned
                ],
            }
            for source, scanned, one in zip(request.sources, scans, draws, strict=True)
        },
    }
