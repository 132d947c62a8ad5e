import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from factories_models import CLIP_SHAPE
from factories_vision import composed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from morebench.config.compose import load_shape
from morebench.models.multiscale import MultiScale
from morebench.models.parts import build_encoder
from morebench.models.vision import OpenClipEncoder, TimmEncoder, TransformersEncoder

NATIVE = CLIP_SHAPE["image_size"]
NO_PREFIX = CLIP_SHAPE | {"activation": "gelu_tanh", "prefix_tokens": 0}
REGISTERS = CLIP_SHAPE | {"activation": "gelu", "prefix_tokens": 5}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": lambda: OpenClipEncoder(CLIP_SHAPE, None, feature_layer=-2),
    "timm": lambda: TimmEncoder(NO_PREFIX, None, feature_layer=-2),
    "timm with registers": lambda: TimmEncoder(REGISTERS, None, feature_layer=-2),
    "transformers": lambda: TransformersEncoder(
        REGISTERS, None, feature_layer=-2, name="dinov2_with_registers"
    ),
}


def three_calls(encoder: nn.Module, pixels: Tensor, scales: tuple[int, ...]) -> Tensor:
    """As the study did it: one call a scale, tiles cut and stitched one at a time."""
    native, outputs = encoder.image_size, []
    for scale in scales:
        size = native * scale
        image = interpolate(pixels.float(), size=(size, size), mode="bicubic").to(pixels.dtype)
        cuts = range(0, size, native)
        tiles = [image[:, :, y : y + native, x : x + native] for y in cuts for x in cuts]
        features = encoder(torch.cat(tiles))
        side = math.isqrt(features.shape[1])
        maps = [
            part.reshape(len(pixels), side, side, -1).permute(0, 3, 1, 2)
            for part in features.split(len(pixels))
        ]
        rows = [torch.cat(maps[row * scale : (row + 1) * scale], dim=3) for row in range(scale)]
        stitched = torch.cat(rows, dim=2).float()
        outputs.append(interpolate(stitched, size=(side, side), mode="area").to(features.dtype))
    return torch.cat(outputs, dim=1).flatten(2).transpose(1, 2)


def lively(encoder: nn.Module) -> nn.Module:
    """As initialised, class tokens, registers and positions are near zero: patches would hardly differ."""
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


@torch.no_grad()
@pytest.mark.parametrize("provider", list(ENCODERS))
@pytest.mark.parametrize("scales", [(1, 2, 3), (1, 3), (2,)])
def test_one_call_equals_one_call_a_scale(provider: str, scales: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = lively(ENCODERS[provider]())
    multiscale = MultiScale(encoder, list(scales))
    pixels = torch.randn(2, 3, multiscale.image_size, multiscale.image_size)
    features = multiscale(pixels)
    torch.testing.assert_close(features, three_calls(encoder, pixels, scales))
    assert multiscale.image_size == scales[-1] * NATIVE
    assert features.shape == (2, multiscale.num_visual_tokens, multiscale.feature_dim)
    assert multiscale.num_visual_tokens == encoder.num_visual_tokens


@torch.no_grad()
@pytest.mark.parametrize("provider", list(ENCODERS))
def test_bf16_resizes_in_fp32(provider: str) -> None:
    """Pixels and features are rounded to bf16 where the study rounded them, no more often."""
    torch.manual_seed(0)
    encoder = lively(ENCODERS[provider]()).to(torch.bfloat16)
    pixels = torch.randn(2, 3, 3 * NATIVE, 3 * NATIVE, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = MultiScale(encoder, [1, 2, 3])(pixels)
    expected = three_calls(encoder, pixels, (1, 2, 3))
    assert features.dtype == torch.bfloat16
    assert torch.equal(seen[0], torch.cat(seen[1:])), "the same tiles, bit for bit, in the same order"
    error = (features.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, "bf16 matrix products of 28 and of 2 to 18 tiles round differently"


@torch.no_grad()
@pytest.mark.parametrize(("choice", "native"), [("clip", 140), ("siglip", 146), ("dinov2_reg", 140)])
def test_the_study_at_true_width_and_patch_size(choice: str, native: int) -> None:
    """One kind of prefix each: class token, none (with 6 pixels to spare, as at 384), class and registers."""
    config = composed((f"vision={choice}", "resolution=s2")).config
    shape = load_shape(config.vision.shape) | {"image_size": native}
    encoder = config.vision.encoder | {"name": None}
    vision = replace(config.vision, shape=shape, encoder=encoder, feature_layer=-shape["blocks"])
    torch.manual_seed(0)
    multiscale = build_encoder(replace(config, vision=vision), None).eval()
    pixels = torch.randn(1, 3, 3 * native, 3 * native)
    expected = three_calls(multiscale.encoder, pixels, (1, 2, 3))
    assert expected.shape == (1, 100, 3 * shape["width"])
    torch.testing.assert_close(multiscale(pixels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("choice", "pixels", "tokens", "width"),
    [
        ("clip", 1008, 576, 3072),
        ("dinov2", 672, 256, 3072),
        ("dinov2_reg", 672, 256, 3072),
        ("siglip", 1152, 729, 3456),
        ("siglip2", 1152, 729, 3456),
    ],
)
def test_the_study_has_its_tokens_and_widths(choice: str, pixels: int, tokens: int, width: int) -> None:
    config = composed((f"vision={choice}", "resolution=s2")).config
    with torch.device("meta"), torch.no_grad():
        multiscale = build_encoder(config, None)
        seen: list[torch.Size] = []
        multiscale.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        features = multiscale(torch.empty(2, 3, pixels, pixels))
    assert features.shape == (2, tokens, width)
    assert (multiscale.image_size, multiscale.num_visual_tokens, multiscale.feature_dim) == (
        pixels,
        tokens,
        width,
    )
    native = multiscale.encoder.image_size
    assert seen == [(2 * 14, 3, native, native)], "one call, 1 + 4 + 9 tiles an image"
