"""Pre-trains a tiny vision encoder: per patch, which digit covers it, of what colour, in which quarter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from morebench.config.compose import load_shape
from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.image_processor import ImageProcessor
from morebench.digits.fitting import fit, reproducible
from morebench.digits.folders import new_folder
from morebench.digits.render import Picture, Scans, load_scans, render
from morebench.digits.tiny_vit import build_vit, penultimate, trained_parameters
from morebench.digits.world import COLOURS, NUMBERS, PLACES, Scene, Thing, draw_scene
from morebench.models.normalise import Normalise

LR = 3e-3
FILLED_SHARE = 0.9  # quarters with a digit: fuller than the data set's scenes, so more to learn per image
MIN_COVER = 0.3  # share of a patch that a digit must cover to be its target
VALUES: tuple[tuple[Any, ...], ...] = (tuple(range(len(NUMBERS))), tuple(COLOURS), PLACES)
NUM_CLASSES = [1 + len(values) for values in VALUES]  # class 0: no digit


@dataclass(frozen=True)
class View:
    """One way from a canvas to the encoder's pixels; all of them keep the centre."""

    processor: ImageProcessor
    visible: Callable[[int, int], tuple[int, int]]  # canvas size -> the part of it that fills the input


def build(folder: Path, provider: str, shape: str, seed: int, steps: int = 600, batch_size: int = 32) -> None:
    """An existing `folder` is kept.

    The loss is read off the block before the last, as the MLLM reads it; the last block and the final norm
    are saved as they were initialised, because a published checkpoint has them.
    """
    if folder.exists():
        return
    facts = load_shape(shape)
    train, _ = load_scans()
    with reproducible(seed), new_folder(folder) as draft:
        model = build_vit(provider, facts)
        heads = nn.Linear(facts["width"], sum(NUM_CLASSES))
        views = make_views(provider, facts)
        normalise = Normalise(views[0].processor.processing)  # mean and std are the same for all

        def loss_of_step(step: int) -> Tensor:
            rng = np.random.default_rng([seed, step])
            scenes = [draw_full_scene(rng) for _ in range(batch_size)]
            pixels_IHW3, targets_I3V = draw_batch(scenes, train, views, facts, rng)
            return dense_loss(heads(penultimate(model, normalise(pixels_IHW3))), targets_I3V)

        matrices, others = trained_parameters(model)
        fit(matrices, [*others, *heads.parameters()], loss_of_step, steps, LR, f"{shape}: learning to see")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "config.json").write_text(dumps(facts, indent=2) + "\n")


def make_views(provider: str, shape: Mapping[str, Any]) -> list[View]:
    """Padded (twice: finetune and the tests do it), cropped and squashed."""
    from timm.data import constants

    if provider == "open_clip":
        mean, std = constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD
    elif shape["prefix_tokens"]:
        mean, std = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
    else:
        mean, std = constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD
    size = shape["image_size"]

    def view(
        resize: Resize, aspect_ratio: AspectRatio, visible: Callable[[int, int], tuple[int, int]]
    ) -> View:
        processing = ImageProcessing(
            resize=resize, resize_to=size, interpolation=Interpolation.bicubic, mean=list(mean), std=list(std)
        )
        return View(ImageProcessor(processing, size, aspect_ratio), visible)

    padded = view(Resize.squash, AspectRatio.pad, lambda width, height: (max(width, height),) * 2)
    cropped = view(Resize.shortest_edge, AspectRatio.square, lambda width, height: (min(width, height),) * 2)
    squashed = view(Resize.squash, AspectRatio.square, lambda width, height: (width, height))
    return [padded, padded, cropped, squashed]


def draw_full_scene(rng: np.random.Generator) -> Scene:
    """Digits and colours may repeat, unlike in the data set."""
    things = []
    for place in PLACES:
        digit, colour = int(rng.integers(len(NUMBERS))), int(rng.integers(len(COLOURS)))
        if rng.random() < FILLED_SHARE:
            things.append(Thing(digit, VALUES[1][colour], place))
    return Scene(tuple(things)) if things else draw_scene(rng)


def draw_batch(
    scenes: list[Scene],
    scans: Scans,
    views: list[View],
    shape: Mapping[str, Any],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """-> uint8 pixels `[I, S, S, 3]`, classes `[I, 3, V]` by VALUES."""
    pixels, targets = [], []
    for scene in scenes:
        picture = render(scene, scans, rng)
        view = views[int(rng.integers(len(views)))]
        pixels.append(view.processor(picture.image))
        targets.append(patch_targets(scene, picture, view, shape))
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(targets))


def patch_targets(scene: Scene, picture: Picture, view: View, shape: Mapping[str, Any]) -> np.ndarray:
    """int64 [3, V]: the classes of the digit that covers most of each patch."""
    size, patch_size = shape["image_size"], shape["patch_size"]
    edges = np.arange(0, size, patch_size)
    classes = np.zeros((len(VALUES), len(edges), len(edges)), dtype=np.int64)
    most = np.full((len(edges), len(edges)), MIN_COVER)
    extent = picture.image.size
    scales = [size / visible for visible in view.visible(*extent)]
    for thing, box in zip(scene.things, picture.boxes, strict=True):
        shares = []
        for start, length, scale in zip((box.left, box.top), extent, scales, strict=True):
            low = (start - length / 2) * scale + size / 2
            overlap = np.minimum(low + box.size * scale, edges + patch_size) - np.maximum(low, edges)
            shares.append(np.clip(overlap / patch_size, 0, 1))
        cover = np.outer(shares[1], shares[0])
        for number, value in enumerate((thing.digit, thing.colour, thing.place)):
            classes[number][cover > most] = 1 + VALUES[number].index(value)
        most = np.maximum(most, cover)
    return classes.reshape(len(VALUES), -1)


def dense_loss(logits_IVZ: Tensor, targets_I3V: Tensor) -> Tensor:
    losses = [
        cross_entropy(logits.flatten(0, 1), targets_I3V[:, number].flatten())
        for number, logits in enumerate(logits_IVZ.split(NUM_CLASSES, dim=-1))
    ]
    return torch.stack(losses).sum()
