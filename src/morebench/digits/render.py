"""Scenes as pixels: scanned digits from scikit-learn, tinted and pasted onto a dark canvas."""

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from morebench.digits.world import COLOURS, PLACES, Scene

MIN_SIDE, MAX_SIDE = 56, 84  # canvas, pixels
MIN_DIGIT, MAX_DIGIT = 20, 28  # drawn size of a scan, pixels
SPLIT_SEED = 1797  # one split for all builders: an encoder must never have seen a scan of the test scenes
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Scans:
    """Scanned digits of one split."""

    ids: np.ndarray  # int64 [N], rows of scikit-learn's data set
    images: np.ndarray  # uint8 [N, 8, 8], ink
    digits: np.ndarray  # int64 [N]

    def draw(self, digit: int, rng: np.random.Generator) -> int:
        """An index into `images` of a scan of `digit`."""
        return int(rng.choice(np.flatnonzero(self.digits == digit)))


@dataclass(frozen=True)
class Box:
    """Where a thing was drawn, in canvas pixels."""

    left: int
    top: int
    size: int


@dataclass(frozen=True)
class Picture:
    image: Image.Image  # RGB
    boxes: tuple[Box, ...]  # one per thing
    scan_ids: tuple[int, ...]  # one per thing


@cache
def load_scans() -> tuple[Scans, Scans]:
    """(train, test), disjoint, each digit split in the same proportion."""
    bundle = load_digits()
    images = np.round(bundle.images * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng(SPLIT_SEED)
    is_test = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(bundle.target == digit))
        is_test[rows[: round(TEST_SHARE * len(rows))]] = True
    train, test = (np.flatnonzero(is_test == wanted) for wanted in (False, True))
    return (
        Scans(train, images[train], bundle.target[train]),
        Scans(test, images[test], bundle.target[test]),
    )


def render(scene: Scene, scans: Scans, rng: np.random.Generator) -> Picture:
    """A canvas of MIN_SIDE to MAX_SIDE a side.

    Every digit lies inside the canvas's central square, so that neither padding nor a centre crop cuts it.
    """
    width, height = _draw_canvas(rng)
    side, longest = min(width, height), max(width, height)
    margin = ceil(side / 16)
    largest = min(MAX_DIGIT, side // 2 - margin)
    smallest = _smallest_digit(longest)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = rng.uniform(0, 50) + rng.uniform(0, 15, size=3)
    boxes, scan_ids = [], []
    for thing in scene.things:
        size = int(rng.integers(smallest, largest + 1))
        row, column = divmod(PLACES.index(thing.place), 2)
        free = side // 2 - margin - size
        left = (width - side) // 2 + _offset(column, side, margin, size, int(rng.integers(0, free + 1)))
        top = (height - side) // 2 + _offset(row, side, margin, size, int(rng.integers(0, free + 1)))
        index = scans.draw(thing.digit, rng)
        ink = Image.fromarray(scans.images[index]).resize((size, size), Image.Resampling.BICUBIC)
        alpha = np.asarray(ink, dtype=np.float32)[:, :, None] / 255
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-12, 12, size=3), 0, 255)
        patch = canvas[top : top + size, left : left + size]
        patch[:] = patch * (1 - alpha) + alpha * colour.astype(np.float32)
        boxes.append(Box(left, top, size))
        scan_ids.append(int(scans.ids[index]))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return Picture(image, tuple(boxes), tuple(scan_ids))


def _draw_canvas(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, drawn again while the shape leaves no room for a digit that stays legible."""
    while True:
        width, height = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, size=2))
        side = min(width, height)
        if _smallest_digit(max(width, height)) <= side // 2 - ceil(side / 16):
            return width, height


def _smallest_digit(longest: int) -> int:
    """A digit keeps 30 % of the longer side, which is two patches or more after resizing."""
    return max(MIN_DIGIT, ceil(0.3 * longest))


def _offset(half: int, side: int, margin: int, size: int, jitter: int) -> int:
    """Pixel offset in the central square: `half` 0 starts at the outer margin, 1 at the middle."""
    return margin + jitter if half == 0 else side - margin - size - jitter
