"""From an image file to the pixels a vision encoder is shown, as the study's image processors made them."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.errors import ConfigError, DataError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # the rest of PIL's readers is attack surface
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_ASPECT_RATIO = 200  # scaling a longer strip's short edge up to the encoder would take gigabytes
RESAMPLING = {
    Interpolation.bilinear: Image.Resampling.BILINEAR,
    Interpolation.bicubic: Image.Resampling.BICUBIC,
}


def resolve_inside(root: Path, relative: str) -> Path:
    """The path of a record's image. Raises DataError if the record points outside `root`.

    Links that lie in `root` are followed: they are the user's own, a record comes from elsewhere.
    """
    if "\0" in relative or "://" in relative:
        raise DataError(f"image {relative!r} is not a path relative to {root}.")
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"image {relative!r} points outside {root}; expected a path relative to it.")
    return root / path


def load_image(path: Path) -> Image.Image:
    """RGB as stored: an EXIF orientation is not applied, as in the study. Raises DataError."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def decode_image(content: bytes) -> Image.Image:
    """Raises DataError with the reason alone."""
    if not content:
        raise DataError("the file is empty.")
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        if problem := _size_problem(*image.size):
            raise DataError(problem)
        return image.convert("RGB")
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image in any of {', '.join(FORMATS)}.") from None
    except Exception as error:  # PIL's readers let nearly any kind through when a file is damaged
        raise DataError(f"damaged or truncated, cannot be decoded ({error}).") from None


def _size_problem(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels; at most {MAX_PIXELS} in all are decoded."
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return f"{width} x {height} pixels; at most {MAX_ASPECT_RATIO}:1 is usable."
    return None


def mean_colour(processing: ImageProcessing) -> tuple[int, int, int]:
    """What padding is filled with; 8 bits per channel, rounded down as the study did."""
    red, green, blue = (int(255 * value) for value in processing.mean)
    return red, green, blue


class ImageProcessor:
    """Padding, resizing and cropping. The device normalises (`models.normalise`)."""

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

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 [S, S, 3], read-only. The device puts the channels first; there it costs nothing."""
        if self._aspect_ratio is AspectRatio.pad:
            image = pad_to_square(image, mean_colour(self.processing))
        image = self._crop(image.resize(self._resized(image), RESAMPLING[self.processing.interpolation]))
        return np.asarray(image)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        size = self.processing.resize_to
        if self.processing.resize is Resize.squash:
            return size, size
        short, long = sorted(image.size)
        long = int(size * long / short)
        return (size, long) if image.width <= image.height else (long, size)

    def _crop(self, image: Image.Image) -> Image.Image:
        size = self.image_size
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
