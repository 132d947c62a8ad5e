"""Our encoders as vision towers of transformers."""

from typing import Any

import pytest
import torch
from test_vision import CLIP, DINOV2, DINOV2_REG, SIGLIP, pixels_for
from torch import nn

from morebench.config.compose import build, compose_config, load_shape
from morebench.errors import ConfigError, WeightsError
from morebench.models.vision import OpenClipEncoder, PatchEncoder, TimmEncoder, TransformersEncoder
from morebench.models.vision_layouts import _layout_of, _renamed, as_transformers, select_strategy

OPEN_CLIP_GELU = CLIP | {"activation": "gelu"}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "open_clip": (OpenClipEncoder, CLIP, {}),
    "open_clip, exact GELU": (OpenClipEncoder, OPEN_CLIP_GELU, {}),
    "timm SigLIP": (TimmEncoder, SIGLIP, {}),
    "timm DINOv2": (TimmEncoder, DINOV2, {}),
    "transformers CLIP": (TransformersEncoder, CLIP, {"name": "clip_vision_model"}),
    "transformers SigLIP": (TransformersEncoder, SIGLIP, {"name": "siglip_vision_model"}),
    "transformers DINOv2": (TransformersEncoder, DINOV2, {"name": "dinov2"}),
}


def random_encoder(encoder_class: Any, shape: dict[str, Any], options: dict[str, Any]) -> PatchEncoder:
    torch.manual_seed(0)
    encoder: PatchEncoder = encoder_class(shape, None, feature_layer=-2, **options).eval()
    for parameter in encoder.parameters():  # zeros and ones would hide a tensor in the wrong place
        nn.init.normal_(parameter, std=0.2)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_the_tower_gives_our_features(case: str) -> None:
    encoder_class, shape, options = CASES[case]
    encoder = random_encoder(encoder_class, shape, options)
    tower = as_transformers(encoder, shape)
    pixels = torch.randn(2, 3, shape["image_size"], shape["image_size"])
    hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == shape["blocks"]  # the embeddings, and one per block that is built
    torch.testing.assert_close(hidden[-1][:, shape["prefix_tokens"] :], encoder(pixels))


def test_the_position_grid_is_that_of_the_input() -> None:
    """So DINOv2, which resamples in every forward, adds it as it is."""
    encoder = random_encoder(TimmEncoder, DINOV2, {})
    tower: Any = as_transformers(encoder, DINOV2)
    embeddings = tower.embeddings(pixels_for(DINOV2))
    stored = tower.embeddings.interpolate_pos_encoding(embeddings, 24, 24)
    assert stored is tower.embeddings.position_embeddings


@pytest.mark.parametrize("choice", ["clip", "dinov2", "siglip", "siglip2"])
def test_every_tensor_of_a_published_encoder_has_a_place(choice: str) -> None:
    vision = compose_config([f"vision={choice}"]).config.vision
    shape = load_shape(vision.shape)
    with torch.device("meta"):
        encoder = build(vision.encoder, shape=shape, weights=None, feature_layer=vision.feature_layer)
    renamed = _renamed(encoder.model.state_dict(), _layout_of(encoder, shape))
    assert all(key.startswith(("embeddings.", "encoder.", "pre_layrnorm.")) for key in renamed)


def test_which_tokens_llava_drops() -> None:
    assert (select_strategy(0), select_strategy(1)) == ("full", "default")
    with pytest.raises(ConfigError, match=r"5 prefix tokens.*registers"):
        select_strategy(DINOV2_REG["prefix_tokens"])


def test_an_encoder_without_counterpart_is_refused() -> None:
    shape = SIGLIP | {"layer_scale": True}
    with pytest.raises(ConfigError, match="no layer scale"):
        as_transformers(random_encoder(TimmEncoder, shape, {}), shape)


def test_another_computation_of_the_same_tensors_is_noticed() -> None:
    encoder = random_encoder(TimmEncoder, SIGLIP, {})
    with pytest.raises(WeightsError, match="features of SiglipVisionModel differ"):
        as_transformers(encoder, SIGLIP | {"activation": "quick_gelu"})
