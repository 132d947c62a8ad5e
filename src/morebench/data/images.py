"""From an image file to RGB pixels, or to what is wrong with it."""

import stat
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from morebench.data.findings import Kind, SampleError, printable

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # the rest of PIL's readers is attack surface
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_ASPECT_RATIO = 200  # scaling a longer strip's short edge up to the encoder would take gigabytes
MAX_IMAGE_BYTES = 2**28  # more than the largest image that is decoded takes uncompressed

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
