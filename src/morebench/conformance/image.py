"""`vision.image` beside the settings the published weights bring along, and what they make of an image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from morebench.config.schema import Config, Step
from morebench.conformance.findings import Finding, judged, shown
from morebench.data.image_processor import RESAMPLING, ImageProcessor
from morebench.training.stage import recipe_of


def processor_of(config: Config, step: Step, image_size: int) -> ImageProcessor:
    aspect_ratio = recipe_of(config, step)[0].image_aspect_ratio
    return ImageProcessor(config.vision.image, image_size, aspect_ratio, max(config.resolution.scales))


def probe_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def examine_image(config: Config, step: Step, image_size: int) -> Iterator[Finding]:
    pixels = processor_of(config, step, image_size)(probe_image())
    right = pixels.shape == (image_size, image_size, 3) and pixels.dtype == np.uint8
    aspect = recipe_of(config, step)[0].image_aspect_ratio.name
    expected = f"uint8 [{image_size}, {image_size}, 3]"
    yield judged(step.name, "image", right, f"{aspect}, {list(pixels.shape)} values", expected)


def examine_published(config: Config, folder: Path) -> Iterator[Finding]:
    """The preprocessor's settings in the weights' folder, as transformers or timm write them."""
    image = config.vision.image
    for name, settings in _published(folder):
        for ours, theirs in (("mean", image.mean), ("std", image.std)):
            found = settings.get(f"image_{ours}") or settings.get(ours)
            if found is not None:
                same = np.allclose(found, theirs, atol=1e-4)
                yield judged("image", ours, same, f"{theirs}, {name} says {found}", "the published values")
        resampling = settings.get("resample", settings.get("interpolation"))
        known = (image.interpolation.name, RESAMPLING[image.interpolation].value)
        if resampling is not None and resampling not in known:
            yield shown("image", "interpolation", f"{known[0]}, {name} says {resampling}")


def _published(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    hugging_face, timm = folder / "preprocessor_config.json", folder / "config.json"
    if hugging_face.is_file():
        yield hugging_face.name, json.loads(hugging_face.read_text())
    if timm.is_file():
        settings = json.loads(timm.read_text()).get("pretrained_cfg")
        if settings:
            yield timm.name, settings
