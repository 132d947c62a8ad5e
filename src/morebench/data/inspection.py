"""What an image file is, and what is wrong or odd with it."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from morebench.data.findings import Kind, SampleError
from morebench.data.images import open_image, to_rgb

SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_DEEP = re.compile(r".*;(12|16|32)[A-Z]*")  # PIL's name for the layout of pixels in the file
_FORMATS = {"MPO": "JPEG"}  # a JPEG with further pictures behind it


@dataclass(frozen=True)
class Inspection:
    format: str | None  # None if it is none that is read
    width: int  # 0 if not known
    height: int
    problem: tuple[Kind, str] | None  # why it is no image that can be used
    oddities: tuple[tuple[Kind, str], ...] = ()  # of one that can


def inspect_image(content: bytes, name: str) -> Inspection:
    """`name` is looked at for its suffix. Decodes once, in memory bounded by MAX_PIXELS."""
    image: Image.Image | None = None
    try:
        image = open_image(content)
        deep = _is_deep(image)  # loading forgets it
        rgb = to_rgb(image)
    except SampleError as error:
        problem = error.kind, error.reason
        if image is None:
            return Inspection(None, 0, 0, problem)
        return Inspection(_format(image), *image.size, problem)
    return Inspection(_format(image), *rgb.size, None, tuple(_oddities(image, rgb, deep, name)))


def _oddities(image: Image.Image, rgb: Image.Image, deep: bool, name: str) -> list[tuple[Kind, str]]:
    found = []
    suffix, kind = PurePosixPath(name).suffix.lower(), _format(image)
    if SUFFIXES.get(suffix, kind) != kind:
        found.append((Kind.wrong_extension, f"a {kind} file with the suffix {suffix}."))
    if _has_more_frames(image):
        found.append((Kind.animated, "several frames or pages; the first is used."))
    if image.mode == "CMYK":
        found.append((Kind.cmyk, "CMYK; converted without its colour profile."))
    if deep:
        found.append((Kind.deep, _told_depth(image, rgb)))
    if _is_blank(rgb):
        found.append((Kind.blank, f"every pixel is {rgb.getpixel((0, 0))}."))
    return found


def _format(image: Image.Image) -> str:
    kind = image.format or ""
    return _FORMATS.get(kind, kind)


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # what lies behind the first frame is damaged, and not used
        return False


def _is_deep(image: Image.Image) -> bool:
    if image.mode.startswith(("I", "F")):
        return True
    if image.format not in ("PNG", "TIFF"):  # in a BMP 16 bits are a pixel's
        return False
    tiles = [tile.args for tile in getattr(image, "tile", []) if tile.args]
    layouts = (args if isinstance(args, str) else args[0] for args in tiles)
    return any(isinstance(layout, str) and _DEEP.fullmatch(layout) for layout in layouts)


def _told_depth(image: Image.Image, rgb: Image.Image) -> str:
    if not image.mode.startswith(("I", "F")):
        return "16 bits a channel; the upper 8 are used."
    white = rgb.getchannel(0).histogram()[255] / (rgb.width * rgb.height)
    return f"more than 8 bits a pixel, clipped at 255 and not scaled: {white:.0%} of it is white."


def _is_blank(rgb: Image.Image) -> bool:
    right, bottom = rgb.width - 1, rgb.height - 1
    some = {rgb.getpixel((right * x // 4, bottom * y // 4)) for x in range(5) for y in range(5)}
    if len(some) > 1:  # spares nearly every image the other look, which takes long
        return False
    return all(band.getextrema()[0] == band.getextrema()[1] for band in rgb.split())
