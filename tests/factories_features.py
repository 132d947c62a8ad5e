"""A cell whose vision encoder is one of the two tiny ones, and its feature cache."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from factories_training import make_cell, with_recipe
from factories_vision import saved
from torch import Tensor

from morebench.config.compose import build, compose_config, load_shape
from morebench.config.schema import AspectRatio, Config, Features, Part, Resolution, Step
from morebench.data.features import ImageNumbers
from morebench.matrix.features import cache_of_step
from morebench.models.parts import save_parts
from morebench.training.feature_build import build_cache
from morebench.training.feature_encoder import Encode, images_per_call, make_encoder
from morebench.training.features import CacheOf
from morebench.training.signals import StopRequest
from morebench.training.stage import Stage, make_stage, recipe_of


def feature_cell(root: Path, vision: str = "clip_tiny", **changes: Any) -> Config:
    """Random weights of `vision`; `changes` are of resolution, features and the recipes' aspect ratio."""
    config = make_cell(root)
    chosen = compose_config([f"vision={vision}"]).config.vision
    torch.manual_seed(3)
    whole = build(chosen.encoder, shape=load_shape(chosen.shape), weights=None, feature_layer=-1)
    folder = root / "weights" / vision
    folder.mkdir()
    saved(whole.model.state_dict(), folder)
    weights = replace(chosen.weights, folder=str(folder), build=None)
    config = replace(config, vision=replace(chosen, weights=weights), features=Features.cached)
    return with_changes(config, **changes)


def with_changes(
    config: Config,
    scales: list[int] | None = None,
    aspect_ratio: AspectRatio = AspectRatio.pad,
    features: Features = Features.cached,
) -> Config:
    config = replace(config, resolution=Resolution(label="S", scales=scales or [1]), features=features)
    return with_recipe(config, image_aspect_ratio=aspect_ratio)


class Encoder:
    """A cell's encoder that counts its images."""

    def __init__(self, config: Config, step: Step = Step.pretrain) -> None:
        self.cache, data = cache_of_step(config, step)
        self.images = ImageNumbers.of(data.samples)
        aspect_ratio = recipe_of(config, step)[0].image_aspect_ratio
        self.dataset, self._encode = make_encoder(config, self.cache, self.images, data, aspect_ratio)
        self.per_call = images_per_call(config.resolution.scales)
        self.encoded = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return self._encode(pixels)

    def build(self, shard_images: int = 8, encode: Encode | None = None, per_call: int = 3) -> int:
        return build_cache(
            self.cache,
            self.dataset,
            encode or self,
            per_call=per_call,
            num_workers=0,
            stop=StopRequest(),
            shard_bytes=shard_images * self.cache.image_bytes,
        )


def build_features(config: Config, step: Step = Step.pretrain) -> CacheOf:
    encoder = Encoder(config, step)
    encoder.build()
    return encoder.cache


def build_until(config: Config, num_images: int) -> None:
    """SIGKILL once so many images were encoded."""
    encoder = Encoder(config)

    def fatal(pixels: Tensor) -> Tensor:
        features = encoder(pixels)
        if encoder.encoded >= num_images:
            os.kill(os.getpid(), signal.SIGKILL)
        return features

    encoder.build(encode=fatal)


def stage_of(config: Config, step: Step, folder: Path) -> Stage:
    """Finetune starts from the seeded projector."""
    pretrain = make_stage(replace(config, features=Features.computed), Step.pretrain, {})
    folder.mkdir(exist_ok=True)
    save_parts(pretrain.mllm, [Part.projector], folder)
    return make_stage(config, step, {Step.pretrain: folder})


def loss_and_gradients(stage: Stage, micro_batches: int) -> tuple[float, dict[str, Tensor]]:
    """Of the first global batch."""
    dataset = stage.dataset(stage.plan(1, micro_batches), 0)
    total = 0.0
    for number in range(micro_batches):
        batch = dataset[number]
        loss = stage.mllm(batch) / batch.num_supervised
        loss.backward()
        total += loss.item()
    named = stage.mllm.named_parameters()
    return total, {name: value.grad for name, value in named if value.grad is not None}
