"""Writes the digits data set: records, images and three test sets."""

from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np

from morebench.digits.conversations import (
    TEXT_ONLY_SHARE,
    caption_record,
    conversation_record,
    text_record,
)
from morebench.digits.folders import new_folder
from morebench.digits.render import Scans, load_scans, render
from morebench.digits.tasks import (
    multiple_choice_records,
    pope_records,
    vqa_records,
)
from morebench.digits.world import Scene, draw_scene
from morebench.progress import track

IMAGES = "images"
SCAN_IDS = "scans.json"  # image file -> rows of scikit-learn's digits drawn in it


def build(
    folder: Path,
    seed: int,
    num_pretrain: int = 6000,
    num_finetune: int = 6000,
    num_test_scenes: int = 200,
    num_test_items: int = 600,
) -> None:
    """An existing `folder` is kept. Test scenes show scans that no training image shows."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    train, test = load_scans()
    with new_folder(folder) as draft:
        (draft / IMAGES).mkdir()
        writer = _ImageWriter(draft / IMAGES)
        pretrain = [
            caption_record(
                f"pretrain_{number:05d}",
                *writer.add(f"pretrain_{number:05d}", train, rng),
                rng,
            )
            for number, rng in _numbered(num_pretrain, [seed, 0], "digits captions")
        ]
        finetune = [
            text_record(f"finetune_{number:05d}", rng)
            if rng.random() < TEXT_ONLY_SHARE
            else conversation_record(
                f"finetune_{number:05d}",
                *writer.add(f"finetune_{number:05d}", train, rng),
                rng,
            )
            for number, rng in _numbered(num_finetune, [seed, 1], "digits conversations")
        ]
        drawn = [
            writer.add(f"test_{number:05d}", test, rng)
            for number, rng in _numbered(num_test_scenes, [seed, 2], "digits test scenes")
        ]
        images, scenes = [image for image, _ in drawn], [scene for _, scene in drawn]
        _write(draft / "pretrain.json", pretrain)
        _write(draft / "finetune.json", finetune)
        for stream, (name, make) in enumerate(TEST_SETS.items(), start=3):
            rng = np.random.default_rng([seed, stream])
            _write(draft / f"{name}.json", make(images, scenes, num_test_items, rng))
        _write(draft / SCAN_IDS, writer.scan_ids)


TEST_SETS: dict[str, Callable[..., list[Any]]] = {
    "digits_vqa": vqa_records,
    "digits_pope": pope_records,
    "digits_mc": multiple_choice_records,
}


class _ImageWriter:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scan_ids: dict[str, tuple[int, ...]] = {}

    def add(self, stem: str, scans: Scans, rng: np.random.Generator) -> tuple[str, Scene]:
        scene = draw_scene(rng)
        picture = render(scene, scans, rng)
        name = f"{stem}.png"
        picture.image.save(self.folder / name, compress_level=1)
        self.scan_ids[name] = picture.scan_ids
        return name, scene


def _numbered(total: int, stream: list[int], label: str) -> Iterator[tuple[int, np.random.Generator]]:
    """A generator of its own per item, so that changing one leaves the others as they are."""
    for number in track(range(total), label):
        yield number, np.random.default_rng([*stream, number])


def _write(path: Path, content: Any) -> None:
    path.write_text(dumps(content, indent=1) + "\n")
