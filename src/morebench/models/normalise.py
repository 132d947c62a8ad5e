"""The last step from an image file to the vision encoder, on the device: workers send 8 bits per value."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from morebench.config.schema import ImageProcessing


class Normalise(nn.Module):
    """(v / 255 - mean) / std in fp32, bit-equal to numpy's on every device."""

    def __init__(self, processing: ImageProcessing) -> None:
        super().__init__()
        self._values = [[255.0] * 3, processing.mean, processing.std]
        self.constants: Tensor
        # Tensors, because CUDA multiplies with the reciprocal of a plain number, which rounds differently.
        self.register_buffer("constants", torch.tensor(self._values)[:, :, None, None], persistent=False)

    def forward(self, pixels_IHW3: Tensor) -> Tensor:
        """uint8 -> fp32 `[I, 3, H, W]`. Raises ValueError for anything else: it would be scaled twice."""
        if pixels_IHW3.dtype is not torch.uint8 or pixels_IHW3.shape[3:] != (3,):
            found = f"{pixels_IHW3.dtype} {list(pixels_IHW3.shape)}"
            raise ValueError(
                f"pixels must be uint8 [I, H, W, 3], as ImageProcessor gives them; found {found}"
            )
        whole, mean, std = self.constants
        pixels_I3HW = pixels_IHW3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels_I3HW.div_(whole).sub_(mean).div_(std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The constants follow the model to its device, but a cast of the model does not round them."""
        super()._apply(fn, recurse)
        self.constants = torch.tensor(self._values, device=self.constants.device)[:, :, None, None]
        return self
