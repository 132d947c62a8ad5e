"""What must hold between a vision encoder's shape, the layer it is read at and the resolution. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from morebench.config.schema import ImageProcessing, Resolution, Vision
from morebench.errors import ConfigError

PROVIDERS = tuple(
    f"morebench.models.vision.{name}" for name in ("OpenClipEncoder", "TimmEncoder", "TransformersEncoder")
)
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
_COUNTS = ("image_size", "patch_size", "width", "blocks", "heads", "mlp_dim")
_REQUIRED = (*_COUNTS, "prefix_tokens", "activation", "norm_eps")
_OPTIONAL = ("layer_scale", "pretrain_image_size", "position_antialias")


def vision_problems(vision: Vision, shape: Mapping[str, Any], resolution: Resolution) -> list[str]:
    """A sentence for everything that no encoder could be built from. `shape`: content of vision.shape."""
    return [
        *_recipe_problems(vision.encoder),
        *_image_problems(vision.image),
        *(wrong := list(_shape_problems(shape))),
        *([] if wrong else _layer_problems(shape["blocks"], vision.feature_layer)),
        *([] if wrong else _scale_problems(resolution.scales, shape["image_size"])),
    ]


def built_blocks(blocks: int, feature_layer: int) -> int:
    """How many of an encoder's blocks run. Raises ConfigError for a layer that it has not.

    `feature_layer` counts from the end of transformers' `hidden_states`, which has `blocks + 1` entries: the
    embeddings, then the output of each block before any final norm. -1 needs all blocks, -2 all but the last.
    """
    for problem in _layer_problems(blocks, feature_layer):
        raise ConfigError(problem)
    return blocks + 1 + feature_layer


def num_visual_tokens(shape: Mapping[str, Any]) -> int:
    """Of one image, at any resolution: S2 adds channels, not tokens. `shape`: content of vision.shape."""
    return (shape["image_size"] // shape["patch_size"]) ** 2


def scales_of_pixels(pixels: Sequence[int], image_size: int) -> list[int]:
    """S2 scales as multiples of the encoder's native size, ascending: (336, 672, 1008) at 336 is [1, 2, 3].

    The study's `--s2_scales` are pixels in any order. Raises one ConfigError for all that are no multiple,
    for a size given twice and for an empty list.
    """
    wrong = [size for size in pixels if size < 1 or size % image_size]
    if wrong or not pixels or len(set(pixels)) < len(pixels):
        found = f"{wrong} are no multiples" if wrong else f"found {list(pixels)}"
        raise ConfigError(
            f"S2 sizes in pixels must be different multiples of the vision encoder's {image_size}, e.g. "
            f"{image_size}, {2 * image_size}, {3 * image_size}: {found}."
        )
    return sorted(size // image_size for size in pixels)


def _recipe_problems(encoder: Mapping[str, Any]) -> Iterator[str]:
    target = encoder.get("_target_")
    if target not in PROVIDERS:
        yield f"vision.encoder._target_ must be one of {', '.join(PROVIDERS)}; found {target}."
    elif target.endswith("TransformersEncoder") and not encoder.get("name"):
        yield (
            "vision.encoder.name must be the model_type of transformers' vision model, e.g. dinov2 or "
            f"siglip_vision_model; found {encoder.get('name')}."
        )
    if unknown := sorted(encoder.keys() - {"_target_", "name"}):
        yield f"vision.encoder has _target_ and name; found {', '.join(unknown)} as well."


def _image_problems(image: ImageProcessing) -> Iterator[str]:
    for name, values in (("mean", image.mean), ("std", image.std)):
        if len(values) != 3:
            yield f"vision.image.{name} must have a value each for red, green and blue, found {values}."
    if any(not value > 0 for value in image.std):
        yield f"vision.image.std must be above 0, found {image.std}."


def _shape_problems(shape: Mapping[str, Any]) -> Iterator[str]:
    if missing := [key for key in _REQUIRED if key not in shape]:
        yield f"vision.shape lacks {', '.join(missing)}."
    if unknown := sorted(shape.keys() - {*_REQUIRED, *_OPTIONAL}):
        yield f"vision.shape has unknown {', '.join(unknown)}. Known: {', '.join((*_REQUIRED, *_OPTIONAL))}."
    if missing:
        return
    for key in _COUNTS:
        if type(shape[key]) is not int or shape[key] < 1:
            yield f"vision.shape: {key} must be a whole number above 0, found {shape[key]!r}."
            return
    if type(shape["prefix_tokens"]) is not int or shape["prefix_tokens"] < 0:
        yield f"vision.shape: prefix_tokens must be a whole number, found {shape['prefix_tokens']!r}."
    if not isinstance(shape["norm_eps"], float) or shape["norm_eps"] <= 0:
        yield f"vision.shape: norm_eps must be a number above 0, found {shape['norm_eps']!r}."
    if shape["width"] % shape["heads"]:
        yield f"vision.shape: width={shape['width']} is no multiple of heads={shape['heads']}."
    if shape["patch_size"] > shape["image_size"]:
        sizes = f"patch_size={shape['patch_size']}, image_size={shape['image_size']}"
        yield f"vision.shape: a patch must fit into the image, found {sizes}."
    if shape["activation"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        yield f"vision.shape: activation must be one of {known}; found {shape['activation']}."
    if ("pretrain_image_size" in shape) != ("position_antialias" in shape):
        yield (
            "vision.shape: pretrain_image_size (another position grid than the input's) and "
            "position_antialias (how it is resampled) go together; found one of them."
        )


def _layer_problems(blocks: int, feature_layer: int) -> Iterator[str]:
    if not -blocks <= feature_layer <= -1:
        yield (
            f"vision.feature_layer={feature_layer}, but the encoder has {blocks} blocks: -1 (after the last) "
            f"to {-blocks} (after the first) are right; the study reads -2."
        )


def _scale_problems(scales: Sequence[int], image_size: int) -> Iterator[str]:
    given = f"resolution.scales={list(scales)}"
    if max(scales, default=0) >= image_size:  # nobody means that many tiles a side
        try:
            meant = scales_of_pixels(scales, image_size)
        except ConfigError as error:
            yield f"{given} are pixels, not multiples of the encoder's native size. {error}"
        else:
            yield f"{given} are pixels; scales are multiples of the encoder's {image_size}: write {meant}."
    elif not scales or scales[0] < 1 or any(b <= a for a, b in pairwise(scales)):
        yield (
            f"{given} must be ascending multiples of the vision encoder's native size, e.g. [1] (the encoder "
            "alone) or [1,2,3] (S2)."
        )
