"""Micro-batches of realistic lengths without a data set: random ids, random pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from morebench.config.compose import load_shape
from morebench.config.schema import Config, Step
from morebench.data.batch import Batch, collate
from morebench.data.chat import Encoded
from morebench.models.flops import sample_flops, sizes
from morebench.training.stage import recipe_of

TEXT_ONLY = 0.06  # share of finetune samples, as in LLaVA-1.5's mix


@dataclass(frozen=True)
class Drawn:
    encoded: Encoded
    pixels: list[np.ndarray]


@dataclass(frozen=True)
class Micro:
    batch: Batch
    samples: list[Drawn]


def micro_batches(config: Config, step: Step, tokens: int, number: int, tiny: bool) -> Iterator[Micro]:
    """Each of as many samples as fit into `tokens`."""
    draw = np.random.default_rng(0)
    scale, filled = 0.1 if tiny else 1.0, []
    for _ in range(number):
        samples = [_sample(config, step, draw, scale)]
        room = tokens - len(samples[0].encoded.input_ids)
        while len((one := _sample(config, step, draw, scale)).encoded.input_ids) <= room:
            samples.append(one)
            room -= len(one.encoded.input_ids)
        filled.append(samples)
    supervised = sum(int(one.encoded.supervised[1:].sum()) for samples in filled for one in samples)
    for samples in filled:
        encoded, pixels = [one.encoded for one in samples], [p for one in samples for p in one.pixels]
        size = image_size(config)
        yield Micro(collate(encoded, pixels, range(len(samples)), supervised, size), samples)


def flops(config: Config, step: Step, batches: list[Micro]) -> int:
    model, recipe = sizes(config), recipe_of(config, step)[0]
    return sum(
        sample_flops(
            model,
            len(one.encoded.input_ids),
            len(one.pixels),
            int(one.encoded.supervised[1:].sum()),
            recipe.trainable,
        )
        for micro in batches
        for one in micro.samples
    )


def image_size(config: Config) -> int:
    return load_shape(config.vision.shape)["image_size"] * max(config.resolution.scales)


def _sample(config: Config, step: Step, draw: np.random.Generator, scale: float) -> Drawn:
    """Pretrain: captions of 25 tokens, 20 supervised; finetune: 250, or 1,000 without an image, the half of
    them supervised, lognormal."""
    model, recipe = sizes(config), recipe_of(config, step)[0]
    has_image = step is Step.pretrain or draw.random() >= TEXT_ONLY
    visual = model.num_visual_tokens if has_image else 0
    mean, spread = (25, 0.3) if step is Step.pretrain else (250 if has_image else 1000, 0.6)
    text = max(8, round(scale * mean * draw.lognormal(-(spread**2) / 2, spread)))
    length = min(visual + text, recipe.max_length)
    ids = draw.integers(3, model.vocab_size - 1, length, dtype=np.int32)  # the last stands for an image
    mask, supervised = np.zeros(length, np.bool_), np.zeros(length, np.bool_)
    mask[1 : 1 + visual] = True
    ids[mask] = 0
    share = 0.8 if step is Step.pretrain else 0.5
    supervised[length - round(share * (length - visual)) :] = True
    size = image_size(config)
    pixels = [draw.integers(0, 256, (size, size, 3), dtype=np.uint8)] if has_image else []
    return Drawn(Encoded(ids, supervised, mask, False), pixels)
