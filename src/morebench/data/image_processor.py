"""From a decoded image to the pixels a vision encoder is shown: padding, resizing, cropping."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.images import MAX_PIXELS
from morebench.errors import ConfigError

RESAMPLING = {  # as the settings of Pillow and transformers say it
    Interpolation.bilinear: Image.Resampling.BILINEAR,
    Interpolation.bicubic: Image.Resampling.BICUBIC,
}


def mean_colour(processing: ImageProcessing) -> tuple[int, int, int]:
    """What padding is filled with; 8 bits per channel, rounded down as the study did."""
    red, green, blue = (int(255 * value) for value in processing.mean)
    return red, green, blue


class ImageProcessor:
    """The same pixels on every CPU and under every version of Pillow. The device normalises."""

    def __init__(
        self, processing: ImageProcessing, image_size: int, aspect_ratio: AspectRatio, scale: int = 1
    ) -> None:
        """`image_size` is what the encoder takes: under S2 `scale` times its native size.

        `processing.resize_to` is for the native size. Raises ConfigError if the two do not fit.
        """
        processing = replace(processing, resize_to=processing.resize_to * scale)
        size = processing.resize_to
        if size < image_size or (processing.resize is Resize.squash and size != image_size):
            raise ConfigError(
                f"vision.image.resize_to={size} ({processing.resize.name}) does not give the "
                f"{image_size} pixels that the vision encoder takes."
            )
        self.processing = processing
        self.image_size = image_size
        self._aspect_ratio = aspect_ratio
        self._colour = mean_colour(processing)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB -> uint8 [S, S, 3]. The device puts the channels first; there it costs nothing."""
        pixels, side = np.array(image), max(image.size)
        frame = (side, side) if self._aspect_ratio is AspectRatio.pad else image.size
        width, height = self._resized(frame)
        if frame[0] * frame[1] > MAX_PIXELS:
            # A long strip's square would take gigabytes. Resizing runs along x, rounds to 8 bits, and then
            # along y: so along x some rows at a time, and none of padding, give the same pixels.
            rows = max(1, MAX_PIXELS // side)
            bands = [pixels[top : top + rows] for top in range(0, len(pixels), rows)]
            bands = [self._resize(self._pad(band, side, len(band)), width, len(band)) for band in bands]
            pixels, frame = np.concatenate(bands), (width, side)
        return _crop(self._resize(self._pad(pixels, *frame), width, height), self.image_size)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        wanted = self.processing.resize_to
        if self.processing.resize is Resize.squash:
            return wanted, wanted
        short, long = sorted(size)
        long = int(wanted * long / short)
        return (wanted, long) if size[0] <= size[1] else (long, wanted)

    def _pad(self, pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        rows, columns, _ = pixels.shape
        if (columns, rows) == (width, height):
            return pixels
        row = np.tile(np.array(self._colour, dtype=np.uint8), width)
        padded = np.empty((height, width, 3), dtype=np.uint8)
        padded.reshape(height, -1)[:] = row  # whole rows: several times as fast as pixel by pixel
        left, top = (width - columns) // 2, (height - rows) // 2
        padded[top : top + rows, left : left + columns] = pixels
        return padded

    def _resize(self, pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        """In integers, so that neither the CPU's vector instructions nor the number of threads show."""
        # With these strides torch keeps the channels last in memory; with others it turns them round, twice.
        image_13HW = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
        mode = self.processing.interpolation.name
        resized = interpolate(image_13HW, size=(height, width), mode=mode, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()


def _crop(pixels: np.ndarray, size: int) -> np.ndarray:
    left, top = (pixels.shape[1] - size) // 2, (pixels.shape[0] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])
