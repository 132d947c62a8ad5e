"""From an image file to the pixels a vision encoder is shown, as the study's image processors made them."""

import stat
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.findings import Kind, SampleError, printable
from morebench.errors import ConfigError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # the rest of PIL's readers is attack surface
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_ASPECT_RATIO = 200  # scaling a longer strip's short edge up to the encoder would take gigabytes
MAX_IMAGE_BYTES = 2**28  # more than the largest image that is decoded takes uncompressed
RESAMPLING = {
    Interpolation.bilinear: Image.Resampling.BILINEAR,
    Interpolation.bicubic: Image.Resampling.BICUBIC,
}

# What PIL would warn of is refused here, or found by an inspection. A filter is the whole process's, and
# warnings.catch_warnings is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path) -> bytes:
    """Raises SampleError, also for what is no file: reading a pipe may never end."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(Kind.unreadable, "not a file.")
        if found.st_size > MAX_IMAGE_BYTES:
            raise SampleError(
                Kind.too_large, f"a file of {found.st_size} bytes; at most {MAX_IMAGE_BYTES} are read."
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError(Kind.missing, f"{error.strerror}.") from None
    except OSError as error:
        raise SampleError(Kind.unreadable, f"{error.strerror or error}.") from None


def load_image(path: Path) -> Image.Image:
    """RGB as stored: an EXIF orientation is not applied, as in the study. Raises SampleError."""
    try:
        return decode_image(read_image(path))
    except SampleError as error:
        raise SampleError(error.kind, f"{path}: {error.reason}") from None


def decode_image(content: bytes) -> Image.Image:
    """Raises SampleError with the reason alone."""
    return to_rgb(open_image(content))


def open_image(content: bytes) -> Image.Image:
    """Its header; the pixels are decoded later. Raises SampleError."""
    if not content:
        raise SampleError(Kind.empty_file, "the file is empty.")
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        if name := _begins_like(content):
            raise SampleError(Kind.damaged, f"begins like {name}, but its header cannot be read.") from None
        raise SampleError(Kind.not_an_image, f"not an image in any of {', '.join(FORMATS)}.") from None
    except Exception as error:
        raise _damaged(error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SampleError(
            Kind.too_large, f"{width} x {height} pixels; at most {MAX_PIXELS} in all are decoded."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleError(
            Kind.too_long, f"{width} x {height} pixels; at most {MAX_ASPECT_RATIO}:1 is usable."
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Raises SampleError."""
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> SampleError:
    """PIL's readers let nearly any kind of exception through when a file is damaged."""
    if isinstance(error, Image.DecompressionBombError):
        return SampleError(
            Kind.too_large, f"more than {2 * MAX_PIXELS} pixels; at most {MAX_PIXELS} are decoded."
        )
    if isinstance(error, MemoryError):
        return SampleError(Kind.too_large, "decoding it takes more memory than there is.")
    reason = printable(f"{type(error).__name__}: {error}")
    return SampleError(Kind.damaged, f"damaged or truncated, cannot be decoded ({reason}).")


def _begins_like(content: bytes) -> str | None:
    accepts = {name: Image.OPEN[name][1] for name in FORMATS}
    return next((name for name, accept in accepts.items() if accept and accept(content[:16])), None)


def mean_colour(processing: ImageProcessing) -> tuple[int, int, int]:
    """What padding is filled with; 8 bits per channel, rounded down as the study did."""
    red, green, blue = (int(255 * value) for value in processing.mean)
    return red, green, blue


class ImageProcessor:
    """Padding, resizing, cropping: the same pixels under every version of Pillow. The device normalises."""

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
        """uint8 [S, S, 3], read-only. The device puts the channels first; there it costs nothing."""
        side, size = max(image.size), self.image_size
        frame = (side, side) if self._aspect_ratio is AspectRatio.pad else image.size
        width, height = self._resized(frame)
        # Along x, rounded to 8 bits, then along y, as Pillow up to 12 resizes; from 13 on it takes some tall
        # images the other way round, which gives other pixels. One by one, moreover, x need not run over rows
        # of padding (one colour stays one colour), nor y over columns that the crop drops.
        image = self._pad(image, frame[0], image.height)
        image = self._resize(image, width, image.height)
        image = self._pad(_crop(image, size, image.height), size, frame[1])
        return np.asarray(_crop(self._resize(image, size, height), size, size))

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        wanted = self.processing.resize_to
        if self.processing.resize is Resize.squash:
            return wanted, wanted
        short, long = sorted(size)
        long = int(wanted * long / short)
        return (wanted, long) if size[0] <= size[1] else (long, wanted)

    def _pad(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        padded = Image.new("RGB", (width, height), self._colour)
        padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return padded

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), RESAMPLING[self.processing.interpolation])


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
