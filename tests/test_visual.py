"""Mistakes in the vision and resolution choices are found before anything is built, and without torch."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from factories_vision import composed

from morebench.config.assemble import assemble
from morebench.config.compose import load_shape
from morebench.config.visual import built_blocks, scales_of_pixels, vision_problems
from morebench.errors import ConfigError
from morebench.matrix.cell import cell_of
from morebench.matrix.plan import make_plan
from morebench.models.parts import build_encoder

TARGET = "vision.encoder._target_"
SHAPE = load_shape("vision/siglip_tiny.json")


def problems(
    *overrides: str,
    vision: str = "clip",
    shape: dict[str, Any] | None = None,
    scales: Sequence[int] = (1,),
) -> list[str]:
    config = composed((f"vision={vision}", *overrides)).config
    resolution = replace(config.resolution, scales=list(scales))
    return vision_problems(config.vision, shape or load_shape(config.vision.shape), resolution)


@pytest.mark.parametrize("vision", ["clip", "dinov2", "dinov2_reg", "siglip", "siglip2", "clip_tiny"])
@pytest.mark.parametrize("scales", [[1], [1, 2, 3], [1, 3], [2]])
def test_right_choices_have_no_problem(vision: str, scales: list[int]) -> None:
    assert problems(vision=vision, scales=scales) == []


def test_layers_are_counted_as_hidden_states_are() -> None:
    assert [built_blocks(24, layer) for layer in (-1, -2, -24)] == [24, 23, 1]
    for layer in (0, 3, -25):
        with pytest.raises(ConfigError, match=rf"feature_layer={layer}, .* 24 blocks: -1 .* to -24"):
            built_blocks(24, layer)


@pytest.mark.parametrize("scales", [[], [0], [-1, 1], [1, 1], [1, 2, 2], [3, 2, 1]])
def test_scales_must_ascend_from_one_or_more(scales: list[int]) -> None:
    (problem,) = problems(scales=scales)
    assert "must be ascending multiples of the vision encoder's native size, e.g. [1]" in problem


def test_scales_in_pixels_are_answered_with_the_multiples_meant() -> None:
    (problem,) = problems(scales=[336, 672, 1008])
    assert problem.endswith("scales are multiples of the encoder's 336: write [1, 2, 3].")
    (problem,) = problems(scales=[336, 672, 1008], vision="siglip")
    assert "[336, 672, 1008] are no multiples" in problem
    assert "384, 768, 1152" in problem


def test_pixels_to_scales() -> None:
    assert scales_of_pixels((1008, 336, 672), 336) == [1, 2, 3]
    assert scales_of_pixels([384, 768, 1152], 384) == [1, 2, 3]
    assert scales_of_pixels([448], 224) == [2]
    for pixels, found in (
        ([336, 500, 1000], r"\[500, 1000\] are no multiples"),
        ([0, 336], r"\[0\] are no"),
        ([-336], r"\[-336\] are no"),
        ([], r"found \[\]"),
        ([336, 336], r"found \[336, 336\]"),
    ):
        with pytest.raises(ConfigError, match=rf"encoder's 336, e.g. 336, 672, 1008: {found}"):
            scales_of_pixels(pixels, 336)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (f"{TARGET}=morebench.models.vision.TimEncoder", "found morebench.models.vision.TimEncoder"),
        (f"{TARGET}=torch.nn.Linear", "found torch.nn.Linear"),
        (f"{TARGET}=morebench.models.vision.TransformersEncoder vision.encoder.name=null", "model_type"),
        ("vision.feature_layer=2", "feature_layer=2"),
    ],
)  # fmt: skip
def test_recipes_name_a_provider(override: str, sentence: str) -> None:
    (problem,) = problems(*override.split())
    assert sentence in problem
    if "_target_" in override and "name" not in override:
        for provider in ("OpenClipEncoder", "TimmEncoder", "TransformersEncoder"):
            assert f"morebench.models.vision.{provider}" in problem


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layerscale": True}, "unknown layerscale"),
        ({"heads": 7}, "width=128 is no multiple of heads=7"),
        ({"blocks": 0}, "blocks must be a whole number above 0, found 0"),
        ({"width": "128"}, "width must be a whole number above 0, found '128'"),
        ({"patch_size": 57}, "patch_size=57, image_size=56"),
        ({"prefix_tokens": -1}, "prefix_tokens must be a whole number, found -1"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a number above 0, found '1e-5'"),
        ({"activation": "relu"}, "one of quick_gelu, gelu, gelu_tanh; found relu"),
        ({"pretrain_image_size": 28}, "position_antialias"),
    ],
)
def test_shapes_are_checked(change: dict[str, Any], sentence: str) -> None:
    (problem,) = problems(shape=SHAPE | change)
    assert sentence in problem


def test_a_shape_with_missing_fields_names_them_all() -> None:
    (problem,) = problems(shape={key: SHAPE[key] for key in SHAPE if key not in ("heads", "norm_eps")})
    assert problem == "vision.shape lacks heads, norm_eps."


def test_a_plan_refuses_all_at_once_and_reads_each_cell_whole() -> None:
    """Axes are composed apart, so the scales must be read against the cell's own encoder."""
    rows = [
        [f"vision={vision}", "resolution.scales=[336,672,1008]", f"llm={llm}"]
        for vision in ("clip", "siglip")
        for llm in ("phi4", "phi2")
    ]
    with pytest.raises(ConfigError) as caught:
        make_plan([cell_of(cell) for cell in assemble(rows)])
    clip, siglip = str(caught.value).splitlines()
    assert clip.startswith("vision=clip resolution=native: ")
    assert "write [1, 2, 3]" in clip
    assert "no multiples" in siglip


def test_building_refuses_too() -> None:
    config = composed(("vision=clip_tiny", "resolution.scales=[]", "vision.feature_layer=0")).config
    with pytest.raises(ConfigError, match=r"feature_layer=0(.|\n)*scales=\[\]"):
        build_encoder(config, None)


def test_no_torch_is_needed() -> None:
    code = "import sys, morebench.config.visual, morebench.matrix.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
