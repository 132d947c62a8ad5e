"""Takes candidates of one source in the order of their ranks until enough can be used."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from morebench.data.subset.drops import Drop
from morebench.data.subset.journal import Journal
from morebench.data.subset.look import Looked, Looker
from morebench.data.subset.ranking import Candidate, digest, in_rank_order
from morebench.data.subset.scan import Scanned
from morebench.progress import Progress

CHUNK = 512  # candidates that are looked at before the journal is written


@dataclass
class Draw:
    """What became of one source; `num_looked_at` ends with the last candidate that was taken."""

    wanted: int
    num_taken: int = 0
    num_looked_at: int = 0
    drops: Counter[Drop] = field(default_factory=Counter)


def draw(
    scanned: Sequence[Scanned],
    looker: Looker,
    journal_folder: Path,
    draw: Draw,
    elsewhere: set[str],
    take: Callable[[Candidate, str], None],
    workers: int,
    label: str,
) -> set[str]:
    """Call `take` with every candidate taken and the path of its image.

    Returns the hashes of the images taken; those of `elsewhere` are left out.
    """
    ids: set[tuple[int, int]] = set()
    images: set[str] = set()
    found = _looked_at(scanned, looker, journal_folder, draw.wanted, workers)
    with closing(found), Progress(label, draw.wanted) as progress:
        for candidate, looked in found:
            draw.num_looked_at += 1
            name = (candidate["rank"], candidate["rest"])
            image = looked.image.partition(".")[0]
            if (reason := _reason(looked, name in ids, image in images, image in elsewhere)) is not None:
                draw.drops[reason] += 1
            else:
                ids.add(name)
                images.add(image)
                take(candidate, looked.image)
                draw.num_taken += 1
            progress.update(draw.num_taken, f"{draw.num_looked_at} looked at")
            if draw.num_taken == draw.wanted:
                break
    return images


def _reason(looked: Looked, id_taken: bool, image_taken: bool, image_elsewhere: bool) -> Drop | None:
    if looked.problem is not None:
        return looked.problem
    if id_taken:
        return Drop.duplicate_id
    if image_taken:
        return Drop.duplicate_image
    return Drop.in_other_source if image_elsewhere else None


def _looked_at(
    scanned: Sequence[Scanned], looker: Looker, journal_folder: Path, wanted: int, workers: int
) -> Generator[tuple[Candidate, Looked], None, None]:
    journal_folder.mkdir(parents=True, exist_ok=True)
    with (
        Journal(journal_folder / f"{digest(scanned)}.jsonl") as journal,
        ThreadPoolExecutor(workers) as pool,
    ):
        known = iter(journal.known)
        for chunk in in_rank_order(scanned, wanted, CHUNK):
            before = [one if looker.is_there(one) else None for one in islice(known, len(chunk))]
            todo = [number for number in range(len(chunk)) if number >= len(before) or not before[number]]
            new = dict(zip(todo, pool.map(looker, [chunk[number] for number in todo]), strict=True))
            found = [new[number] if number in new else before[number] for number in range(len(chunk))]
            journal.write([one for one in found[len(before) :] if one is not None])
            for candidate, one in zip(chunk, found, strict=True):
                assert one is not None
                yield candidate, one
