"""A stand-in for the study's training data: the published layouts, counts and lengths, none of the content.

    python benchmarks/stand_in.py OUT                    # all: about 25 GB in 936,000 images
    python benchmarks/stand_in.py OUT --scale 0.01       # a hundredth of everything
    python benchmarks/stand_in.py OUT --link             # images of equal content share a file: 2 GB
    python -m morebench.data check pretrain_data=lcs paths.data=OUT

Some records and images are broken on purpose. What was made is printed as JSON at the end, with the number of
findings that a check must have, by the names of `morebench.data.findings.Kind`.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from stand_in_images import ImageFiles
from stand_in_sources import CAPTIONS, INSTRUCT, Source

from morebench.data.records import IMAGE_TOKEN
from morebench.progress import Progress

LAYOUTS = {
    "pretrain": ("llava_pretrain/blip_laion_cc_sbu_558k.json", "images", (CAPTIONS,)),
    "instruct": ("llava_instruct/llava_v1_5_mix665k.json", ".", INSTRUCT),
}
# records of a whole data set that are broken in one way; at least one at any scale
BROKEN_IMAGES = {
    "missing": 40,
    "damaged": 30,
    "empty_file": 20,
    "too_large": 10,
    "wrong_extension": 50,
    "cmyk": 10,
    "deep": 10,
}
BROKEN_RECORDS = {"empty_answer": 25, "turns": 15, "image_count": 15, "outside": 5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of every count")
    parser.add_argument("--what", default=",".join(LAYOUTS))
    parser.add_argument("--link", action="store_true", help="hard links instead of files of their own")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    names = chosen.what.split(",")
    if unknown := sorted(set(names) - set(LAYOUTS)):
        parser.error(f"--what: {', '.join(unknown)}. There are: {', '.join(LAYOUTS)}.")
    print(json.dumps({name: make(name, chosen) for name in names}, indent=1))


def make(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Writes records and images; returns the counts of what was written."""
    records, images_folder, sources = LAYOUTS[name]
    path = chosen.out / records
    path.parent.mkdir(parents=True, exist_ok=True)
    files = ImageFiles(path.parent / images_folder, chosen.seed, chosen.link)
    order = shuffled(sources, chosen.scale, chosen.seed)
    broken = broken_places(order, sources, chosen.scale, chosen.seed)
    generator = random.Random(chosen.seed)
    made = [0] * len(sources)
    ids: set[str | int] = set()
    images: set[str] = set()
    found: Counter[str] = Counter()
    with path.open("w") as file, Progress(name, len(order)) as progress:
        file.write("[")
        for place, number in enumerate(order.tolist()):
            record = sources[number].record(generator, made[number], chosen.scale)
            made[number] += 1
            kind = broken.get(place)
            if kind is not None:
                break_record(record, kind)
                found[kind] += 1
            image = record.get("image")
            if image is not None and image not in images and kind != "outside":
                images.add(image)
                files.write(image, kind)
            found["duplicate_id"] += record["id"] in ids
            ids.add(record["id"])
            file.write((",\n" if place else "\n") + json.dumps(record))
            progress.update(place + 1)
        file.write("\n]\n")
    by_source = {source.name: count for source, count in zip(sources, made, strict=True)}
    return {"records": len(order), "images": len(images), "sources": by_source, "findings": dict(found)}


def shuffled(sources: tuple[Source, ...], scale: float, seed: int) -> np.ndarray:
    """int64 [N]; the source of every record, in the order of the file."""
    counts = [max(1, round(source.records * scale)) for source in sources]
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sources)), counts))


def broken_places(order: np.ndarray, sources: tuple[Source, ...], scale: float, seed: int) -> dict[int, str]:
    """Record -> what is wrong with it. Only what no other record shows is broken: the counts are known."""
    fit = np.array([source.own_images for source in sources])
    places = np.random.default_rng(seed + 1).permutation(np.flatnonzero(fit[order])).tolist()
    kinds = BROKEN_IMAGES | BROKEN_RECORDS
    wanted = [kind for kind, count in kinds.items() for _ in range(max(1, round(count * scale)))]
    if len(places) < len(wanted):
        raise SystemExit(f"--scale {scale}: {len(places)} records can be broken, {len(wanted)} are needed.")
    return dict(zip(places, wanted))  # noqa: B905 - most records are sound


def break_record(record: dict[str, Any], kind: str) -> None:
    question, answer = record["conversations"][0], record["conversations"][-1]
    if kind == "empty_answer":
        answer["value"] = ""
    elif kind == "turns":
        answer["from"] = "human"
    elif kind == "image_count":
        question["value"] = question["value"].replace(IMAGE_TOKEN, "").strip()
    elif kind == "outside":
        record["image"] = f"../{record['image']}"
    elif kind in ("deep", "too_large"):
        record["image"] = record["image"].replace(".jpg", ".png")


if __name__ == "__main__":
    main()
