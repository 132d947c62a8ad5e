"""Images for tests, the plain way of an image processor with Pillow, and a digest of ours.

Run as a program it prints the digest and the CPU capability that torch used.
"""

from hashlib import sha256
from itertools import product

import numpy as np
import torch
from PIL import Image

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.image_processor import RESAMPLING, ImageProcessor, mean_colour

SIZES = [(64, 48), (48, 64), (33, 97), (50, 50), (500, 31), (17, 12)]  # width, height


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def processing_of(resize: Resize, resize_to: int, interpolation: Interpolation) -> ImageProcessing:
    return ImageProcessing(
        resize=resize, resize_to=resize_to, interpolation=interpolation, mean=[0.1, 0.5, 0.9], std=[1.0] * 3
    )


def with_pillow(
    image: Image.Image, processing: ImageProcessing, image_size: int, aspect_ratio: AspectRatio
) -> np.ndarray:
    """Pad, resize along x, then along y as every Pillow did up to 12, crop."""
    if aspect_ratio is AspectRatio.pad:
        image = pad_to_square(image, mean_colour(processing))
    width = height = processing.resize_to
    if processing.resize is Resize.shortest_edge:
        width, height = (int(processing.resize_to * edge / min(image.size)) for edge in image.size)
    resample = RESAMPLING[processing.interpolation]
    image = image.resize((width, image.height), resample).resize((width, height), resample)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def grey_levels(processing: ImageProcessing, normalised: np.ndarray) -> np.ndarray:
    """[3, S, S] -> [S, S, 3]"""
    return (normalised.transpose(1, 2, 0) * np.array(processing.std) + np.array(processing.mean)) * 255


def assert_near(found: np.ndarray, expected: np.ndarray, note: str = "") -> None:
    """Two 8-bit resizes that differ in the last bits of their weights. Both in grey levels."""
    levels = np.abs(found.astype(np.float64) - expected)
    assert levels.max() < 2.01, note
    assert (levels > 1.01).mean() < 1e-4, note
    assert (levels > 0.01).mean() < 0.04, note


def digest() -> str:
    """Of everything that the choices of a vision encoder can ask for, shrinking and growing."""
    found = sha256()
    for resize, interpolation, aspect_ratio in product(Resize, Interpolation, AspectRatio):
        processing = processing_of(resize, 96, interpolation)
        for size in [*SIZES, (500, 400), (400, 500), (400, 900), (96, 96), (1, 40), (1, 1)]:
            found.update(ImageProcessor(processing, 96, aspect_ratio)(noise(*size)).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(torch.backends.cpu.get_cpu_capability(), digest())
