"""S2 (scaling on scales): one encoder sees the image at several scales; the channels are concatenated."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from morebench.models.vision import VisionEncoder


class MultiScale(nn.Module):
    """Any encoder at `scales` (multiples of its native size): the same tokens, `len(scales)` times as wide.

    `scales` ascend, and so do the channels. Pixels come in at the largest scale, `image_size`. As published:
    arXiv 2403.13043.
    """

    def __init__(self, encoder: VisionEncoder, scales: list[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.scales = scales
        self.image_size = encoder.image_size * self.scales[-1]
        self.num_visual_tokens = encoder.num_visual_tokens
        self.feature_dim = encoder.feature_dim * len(self.scales)

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """All tiles of all scales go through the encoder in one call."""
        num_images = len(pixels_I3HW)
        tiles = torch.cat([self._tiles(pixels_I3HW, scale) for scale in self.scales])
        features = self.encoder(tiles).split([scale**2 * num_images for scale in self.scales])
        merged = [self._merge(part, scale) for part, scale in zip(features, self.scales, strict=True)]
        return torch.cat(merged, dim=-1)

    def _tiles(self, pixels_I3HW: Tensor, scale: int) -> Tensor:
        """-> `[scale * scale * I, 3, native, native]`: row-major over tiles, the image innermost."""
        native = self.encoder.image_size
        size = (native * scale, native * scale)
        # bicubic without antialiasing, as published: the native view differs from a resized photograph
        resized = interpolate(pixels_I3HW.float(), size=size, mode="bicubic").to(pixels_I3HW.dtype)
        grid = resized.unflatten(3, (scale, native)).unflatten(2, (scale, native))
        return grid.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)

    def _merge(self, features_NVC: Tensor, scale: int) -> Tensor:
        """Tiles back to one map, averaged over `scale` x `scale` neighbours. -> `[I, V, C]`."""
        side = math.isqrt(self.num_visual_tokens)
        tiles = features_NVC.unflatten(0, (scale, scale, -1)).unflatten(3, (side, side))
        map_ICHW = tiles.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
        pooled = interpolate(map_ICHW.float(), size=(side, side), mode="area").to(features_NVC.dtype)
        return pooled.flatten(2).mT
