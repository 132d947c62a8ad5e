"""Features of the frozen vision encoder: computed, or rounded to 8 bits, or already there."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from morebench.models.normalise import Normalise
from morebench.models.vision import VisionEncoder

BLOCK = 64  # neighbouring channels that share a scale: a few channels of trained encoders are far larger


def encode(normalise: Normalise, vision: VisionEncoder, pixels_IHW3: Tensor) -> Tensor:
    """uint8 -> `[I, V, C]` in the encoder's own precision. The one way to features, cached or not."""
    assert isinstance(vision, nn.Module)
    with torch.no_grad(), _without_autocast(pixels_IHW3.device):
        dtype = next((weight.dtype for weight in vision.parameters()), torch.float32)
        features_IVC: Tensor = vision(normalise(pixels_IHW3).to(dtype))
    return features_IVC


class AbsentEncoder(nn.Module):
    """Stands where a vision encoder would, when its features come from a cache: its sizes, no weights."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.image_size = encoder.image_size
        self.num_visual_tokens = encoder.num_visual_tokens
        self.feature_dim = encoder.feature_dim

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        raise RuntimeError("This model was built for cached features: it has no vision encoder.")


def num_scales(feature_dim: int) -> int:
    """G: blocks of equal size, the largest up to `BLOCK` that divides."""
    return feature_dim // math.gcd(feature_dim, BLOCK)


def to_8bit(features_IVC: Tensor) -> tuple[Tensor, Tensor]:
    """-> int8 `[I, V, C]` and fp32 scales `[I, V, G]`. Off by at most a block's largest value / 254."""
    blocks = features_IVC.float().unflatten(-1, (num_scales(features_IVC.shape[-1]), -1))
    scales = blocks.abs().amax(-1) / 127
    # where a block is zero, or too small to be divided, so is what comes back
    divisor = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.inf)
    values = (blocks / divisor[..., None]).round().clamp(-127, 127)
    return values.to(torch.int8).flatten(-2), scales


def from_8bit(values_IVC: Tensor, scales_IVG: Tensor) -> Tensor:
    """fp32"""
    blocks = values_IVC.float().unflatten(-1, (scales_IVG.shape[-1], -1))
    return (blocks * scales_IVG[..., None]).flatten(-2)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # the meta device has none
