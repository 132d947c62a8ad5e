"""config.json of a published LLaVA-style checkpoint, held against a cell.

Its keys are those of LLaVA-1.5 (`mm_*`, `image_aspect_ratio`, ...) and of LLaVA-MORE (`s2`, `s2_scales`,
`siglip`) on top of the LLM's own. What a checkpoint leaves out means what LLaVA's loader takes for it.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from transformers import AutoConfig

from morebench.config.compose import compose_config, load_shape, options
from morebench.config.schema import Config, Step
from morebench.config.visual import scales_of_pixels
from morebench.errors import ConfigError
from morebench.models.llm import llm_config, shape_differences

MODEL_TYPES = {"llava_llama": "llama", "llava_phi": "phi3", "llava_gemma": "gemma2"}

# key -> (the only value that morebench models, what leaving it out means)
_FIXED: dict[str, tuple[Any, Any]] = {
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_patch_merge_type": ("flat", "flat"),
    "mm_use_im_start_end": (False, False),
    "mm_use_im_patch_token": (False, False),
}


def config_problems(raw: Mapping[str, Any], config: Config, step: Step) -> list[str]:
    """Every contradiction between the checkpoint's config.json and the cell, with what would be right."""
    model_type = MODEL_TYPES.get(raw.get("model_type", ""))
    if model_type is None:
        known = ", ".join(MODEL_TYPES)
        return [f"model_type: one of {known} is read, config.json says {raw.get('model_type')}."]
    return [*_llm_problems(raw, config), *_vision_problems(raw, config), *_recipe_problems(raw, config, step)]


def llm_fields(raw: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """The LLM's own config.json: what LLaVA added is left out, `model_type` is the LLM's.

    Published configs of tied LLMs may omit `tie_word_embeddings`, so the cell's shape says it; the tensors
    have to agree.
    """
    model_type = MODEL_TYPES[raw["model_type"]]
    known = AutoConfig.for_model(model_type).to_dict().keys() | shape.keys() | {"rope_theta", "rope_scaling"}
    fields = {key: value for key, value in raw.items() if key in known and not key.startswith("_")}
    for key in ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        fields.pop(key, None)
    tied = raw.get("tie_word_embeddings", shape.get("tie_word_embeddings", False))
    return fields | {"model_type": model_type, "tie_word_embeddings": tied}


def _llm_problems(raw: Mapping[str, Any], config: Config) -> list[str]:
    shape = load_shape(config.llm.shape)
    problems = _llm_differences(raw, shape)
    if not problems:
        return []
    fitting = [name for name in options("llm") if not _llm_differences(raw, _shape_of("llm", name))]
    right = (
        f"llm choices of the checkpoint's shape: {', '.join(fitting)}."
        if fitting
        else "No llm choice has the checkpoint's shape: give it a file in conf/llm and conf/shapes/llm."
    )
    return [*problems, right]


def _llm_differences(raw: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    model_type = MODEL_TYPES[raw["model_type"]]
    if shape["model_type"] != model_type:
        return [f"model_type: {raw['model_type']} holds a {model_type}, the llm is a {shape['model_type']}."]
    found = llm_config(llm_fields(raw, shape))
    return [
        f"{field}: the cell's llm has {wanted}, config.json {got}."
        for field, wanted, got in shape_differences(shape, found)
    ]


@cache
def _shape_of(group: str, choice: str) -> dict[str, Any]:
    return load_shape(getattr(compose_config([f"{group}={choice}"]).config, group).shape)


def _vision_problems(raw: Mapping[str, Any], config: Config) -> Iterator[str]:
    shape, scales = load_shape(config.vision.shape), sorted(config.resolution.scales)
    width = shape["width"] * len(scales)
    if raw.get("mm_hidden_size", width) != width:
        yield (
            f"mm_hidden_size: {raw['mm_hidden_size']}, the cell's vision encoder is {shape['width']} wide at "
            f"{len(scales)} scales. {_widths(raw['mm_hidden_size'])}"
        )
    if raw.get("mm_vision_select_layer") != config.vision.feature_layer:
        yield (
            f"mm_vision_select_layer: {raw.get('mm_vision_select_layer')}, the cell has "
            f"vision.feature_layer={config.vision.feature_layer}."
        )
    for key, (wanted, default) in _FIXED.items():
        if raw.get(key, default) != wanted:
            yield f"{key}: only {wanted!r} is modelled, config.json says {raw[key]!r}."
    depth = _depth(raw.get("mm_projector_type", "linear"))
    if depth is None:
        yield f"mm_projector_type: linear or mlpNx_gelu is read, config.json says {raw['mm_projector_type']}."
    elif depth != config.projector.depth:
        yield f"mm_projector_type: of {depth} layers, the cell has projector.depth={config.projector.depth}."
    # SigLIP's ViT is the one without a class token.
    if bool(raw.get("siglip", False)) != (shape["prefix_tokens"] == 0):
        yield (
            f"siglip: {raw.get('siglip', False)}, the cell's vision encoder has "
            f"{shape['prefix_tokens']} prefix tokens (SigLIP has none, CLIP and DINOv2 have)."
        )
    yield from _scale_problems(raw, shape["image_size"], scales)


def _scale_problems(raw: Mapping[str, Any], image_size: int, scales: list[int]) -> Iterator[str]:
    found = [1]
    if raw.get("s2", False):
        given = raw.get("s2_scales", "336,672,1008")
        try:
            pixels = [int(size) for size in (given.split(",") if isinstance(given, str) else given)]
            found = scales_of_pixels(pixels, image_size)
        except ConfigError as error:
            yield f"s2_scales: {error}"
            return
        except (TypeError, ValueError):
            yield f"s2_scales: expected sizes in pixels such as 336,672,1008, found {given!r}."
            return
    if found != scales:
        yield f"s2: scales {found}, the cell has resolution.scales={scales}. Choose resolution=s2 or native."


def _widths(width: int) -> str:
    """Which vision choices have features this wide, alone or at three scales."""
    fitting = []
    for name in options("vision"):
        own = _shape_of("vision", name)["width"]
        fitting += [name] * (own == width) + [f"{name} with resolution=s2"] * (3 * own == width)
    return f"Vision choices of this width: {', '.join(fitting) or 'none'}."


def _depth(projector_type: str) -> int | None:
    if projector_type == "linear":
        return 1
    matched = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    return int(matched[1]) if matched else None


def _recipe_problems(raw: Mapping[str, Any], config: Config, step: Step) -> Iterator[str]:
    """What the checkpoint was trained with, and the cell's recipe says of the step that it stands for."""
    recipe = getattr(config.stage, step.name)
    key = f"stage.{step.name}"
    ratio = raw.get("image_aspect_ratio") or "square"
    wanted = recipe.image_aspect_ratio.name
    if ratio != wanted:
        yield (
            f"image_aspect_ratio: {ratio}, the cell has {key}.image_aspect_ratio={wanted}. Set it if it is "
            f"square or pad; {ratio} is not modelled otherwise."
        )
    length = raw.get("tokenizer_model_max_length", recipe.max_length)
    if length != recipe.max_length:
        yield (
            f"tokenizer_model_max_length: {length}, the cell has {key}.max_length={recipe.max_length}. "
            f"Set {key}.max_length={length}."
        )
    evaluated = config.stage.evaluate.image_aspect_ratio.name
    if step is Step.finetune and ratio != evaluated:
        yield f"image_aspect_ratio: {ratio}, the cell has stage.evaluate.image_aspect_ratio={evaluated}."
