"""Models that the providers of vision encoders know by name, and what they say about them."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from morebench.errors import WeightsError, join_problems


def check_timm_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        raise WeightsError(unknown(name, timm.list_models(), "timm has no model"))
    if not timm.models.is_model_in_modules(name, ["vision_transformer"]):
        raise WeightsError(f"timm's {name} is none of the ViTs in timm.models.vision_transformer.")


def open_clip_facts(name: str) -> dict[str, Any]:
    import open_clip

    model = open_clip.get_model_config(name)
    if model is None:
        raise WeightsError(unknown(name, open_clip.list_models(), "open_clip has no model"))
    vision = model["vision_cfg"]
    if not isinstance(vision.get("layers"), int):
        raise WeightsError(
            f"open_clip's {name} has no ViT of open_clip's own. If its image tower is one of timm's, "
            "vision.encoder is morebench.models.vision.TimmEncoder."
        )
    return {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["width"],
        "blocks": vision["layers"],
        "heads": vision["width"] // vision.get("head_width", 64),
        "mlp_dim": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def check_facts(name: str, shape: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: {name} has {facts[key]}, the shape says {shape[key]}"
        for key in facts
        if facts[key] != shape[key]
    ]
    if problems:
        raise WeightsError(join_problems(problems))


def unknown(name: str, known: Collection[str], sentence: str) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"{sentence} {name!r}." + (f" Nearest: {', '.join(near)}." if near else "")
