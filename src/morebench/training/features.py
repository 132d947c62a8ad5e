"""Which feature cache a train step reads: its identity, its place, and how it is built."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from morebench.config.compose import load_shape
from morebench.config.schema import Config, Features, Precision, Step, TrainRecipe
from morebench.data.checked import CheckedData
from morebench.data.features import FeatureCache, ImageNumbers
from morebench.models.features import num_scales
from morebench.models.flops import sizes
from morebench.models.weights import folder_hash

# Raise when a change of the code changes features (decoding, resizing, encoders, S2, rounding) or the files:
# every cache is then built anew.
FEATURES_VERSION = 2


@dataclass(frozen=True)
class CacheOf:
    """What a cache holds; nothing of it depends on an LLM."""

    facts: dict[str, Any]  # everything that can change a byte
    place: Path  # <paths.cache>/features
    name: str  # for people: found is a cache by its digest
    precision: Precision
    is_8bit: bool
    num_visual_tokens: int
    feature_dim: int

    @property
    def facts_text(self) -> str:
        return json.dumps(self.facts, sort_keys=True, default=_plain)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.facts_text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Labels may change: the folder that ends with the digest, or where it will be."""
        there = sorted(self.place.glob(f"*-{self.digest}"))
        return there[0] if there else self.place / f"{self.name}-{self.digest}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder, and of what it gives."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32

    @property
    def storage(self) -> str:
        return "int8" if self.is_8bit else self.precision.name

    @property
    def image_bytes(self) -> int:
        """Features, scales and checksum of an image."""
        per_token = (
            self.feature_dim + 4 * num_scales(self.feature_dim)
            if self.is_8bit
            else self.feature_dim * self.dtype.itemsize
        )
        return self.num_visual_tokens * per_token + 8


def cache_of(config: Config, recipe: TrainRecipe, data: CheckedData, encoder_weights: Path) -> CacheOf:
    """The cache that a train step of this recipe on this data reads, built or not."""
    is_8bit = config.features is Features.cached_8bit
    counted, vision = sizes(config), config.vision
    facts = {
        "version": FEATURES_VERSION,
        "weights": folder_hash(encoder_weights, Path(config.paths.cache)),
        "shape": load_shape(vision.shape),
        "encoder": vision.encoder,
        "feature_layer": vision.feature_layer,
        "image": asdict(vision.image),
        "image_aspect_ratio": recipe.image_aspect_ratio,
        "scales": list(config.resolution.scales),
        "precision": recipe.precision,
        "is_8bit": is_8bit,
        "data": data.content_hash,
    }
    folder, aspect_ratio = data.images.root.parent.name, recipe.image_aspect_ratio.name
    names = (vision.label, config.resolution.label, folder, aspect_ratio)
    name = "-".join(re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names)
    return CacheOf(
        facts=facts,
        place=Path(config.paths.cache) / "features",
        name=name,
        precision=recipe.precision,
        is_8bit=is_8bit,
        num_visual_tokens=counted.num_visual_tokens,
        feature_dim=counted.projector[0] // counted.llm_width,
    )


def open_features(
    config: Config, step: Step, recipe: TrainRecipe, data: CheckedData, encoder_weights: Path
) -> FeatureCache | None:
    """The cache the config asks for, None where features are computed. Raises DataError: it is not whole."""
    if config.features is Features.computed:
        return None
    cache = cache_of(config, recipe, data, encoder_weights)
    build = (
        f"python -m morebench.data cache features={config.features.name} stage={step.name} and what else "
        "this run was started with"
    )
    return FeatureCache(cache.folder, ImageNumbers.of(data.samples), build)


def _plain(value: Any) -> Any:
    assert isinstance(value, Enum), value
    return value.name
