import math
from collections.abc import Callable

import pytest
import torch
from factories_models import CLIP_SHAPE
from torch import Tensor, nn
from torch.nn.functional import interpolate

from morebench.models.multiscale import MultiScale
from morebench.models.vision import OpenClipEncoder, TimmEncoder, TransformersEncoder

NATIVE = CLIP_SHAPE["image_size"]
PLAIN = CLIP_SHAPE | {"activation": "gelu", "prefix_tokens": 5}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": lambda: OpenClipEncoder(CLIP_SHAPE, None, feature_layer=-2),
    "timm": lambda: TimmEncoder(PLAIN, None, feature_layer=-2),
    "transformers": lambda: TransformersEncoder(PLAIN, None, feature_layer=-2, name="dinov2_with_registers"),
}


def three_calls(encoder: nn.Module, pixels: Tensor, scales: tuple[int, ...]) -> Tensor:
    """As the study did it: one call a scale, tiles cut and stitched one at a time."""
    outputs = []
    for scale in scales:
        size = NATIVE * scale
        image = interpolate(pixels, size=(size, size), mode="bicubic")
        cuts = range(0, size, NATIVE)
        tiles = [image[:, :, y : y + NATIVE, x : x + NATIVE] for y in cuts for x in cuts]
        features = encoder(torch.cat(tiles))
        side = math.isqrt(features.shape[1])
        maps = [
            part.reshape(len(pixels), side, side, -1).permute(0, 3, 1, 2)
            for part in features.split(len(pixels))
        ]
        rows = [torch.cat(maps[row * scale : (row + 1) * scale], dim=3) for row in range(scale)]
        outputs.append(interpolate(torch.cat(rows, dim=2), size=(side, side), mode="area"))
    return torch.cat(outputs, dim=1).flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("provider", list(ENCODERS))
@pytest.mark.parametrize("scales", [(1, 2, 3), (1, 3)])
def test_one_call_equals_one_call_a_scale(provider: str, scales: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[provider]().eval()
    multiscale = MultiScale(encoder, list(scales))
    pixels = torch.randn(2, 3, multiscale.image_size, multiscale.image_size)
    features = multiscale(pixels)
    torch.testing.assert_close(features, three_calls(encoder, pixels, scales))
    assert multiscale.image_size == 3 * NATIVE
    assert features.shape == (2, multiscale.num_visual_tokens, multiscale.feature_dim)
    assert multiscale.num_visual_tokens == encoder.num_visual_tokens


@torch.no_grad()
def test_fourteen_tiles_go_through_the_encoder_at_once() -> None:
    encoder = ENCODERS["open_clip"]().eval()
    seen = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    MultiScale(encoder, [1, 2, 3])(torch.zeros(2, 3, 3 * NATIVE, 3 * NATIVE))
    assert seen == [(2 * 14, 3, NATIVE, NATIVE)]
