"""Any bytes are an image or a finding, never another exception."""

import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from morebench.data import images
from morebench.data.findings import Kind, SampleError
from morebench.data.images import decode_image, read_image
from morebench.data.inspection import Inspection, inspect_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning:PIL.Image")


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """`header`: width, height, bits, colour type."""
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header + bytes(3)), *chunks, (b"IEND", b"")):
        made += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    return made


def png16(colour_type: int, pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(struct.pack(">IIBB", width, height, 16, colour_type), (b"IDAT", zlib.compress(rows)))


FRAMES = {"save_all": True, "append_images": [noise(20, 9), noise(20, 9).rotate(90)]}
GOOD = {
    "a.jpg": encode(noise(20, 9), "JPEG"),
    "progressive.jpeg": encode(noise(20, 9), "JPEG", progressive=True),
    "a.png": encode(noise(20, 9)),
    "palette.png": encode(noise(20, 9).quantize(), transparency=bytes(range(256))),
    "alpha.png": encode(noise(20, 9, 4)),
    "bits.png": encode(noise(20, 9).convert("1")),
    "a.gif": encode(noise(20, 9), "GIF"),
    "a.webp": encode(noise(20, 9), "WEBP"),
    "lossless.webp": encode(noise(20, 9), "WEBP", lossless=True),
    "a.bmp": encode(noise(20, 9), "BMP"),
    "a.tif": encode(noise(20, 9), "TIFF"),
    "lzw.tiff": encode(noise(20, 9), "TIFF", compression="tiff_lzw"),
    "jpeg.tiff": encode(noise(20, 9), "TIFF", compression="jpeg"),
}
ODD = {
    "cmyk.jpg": (encode(noise(20, 9, 4).convert("CMYK"), "JPEG"), Kind.cmyk),
    "cmyk.tif": (encode(noise(20, 9).convert("CMYK"), "TIFF"), Kind.cmyk),
    "moving.gif": (encode(noise(20, 9), "GIF", **FRAMES), Kind.animated),
    "moving.webp": (encode(noise(20, 9), "WEBP", **FRAMES), Kind.animated),
    "moving.png": (encode(noise(20, 9), "PNG", **FRAMES), Kind.animated),
    "pages.tif": (encode(noise(20, 9), "TIFF", **FRAMES), Kind.animated),
    "stereo.jpg": (encode(noise(20, 9), "MPO", **FRAMES), Kind.animated),
    "white.png": (encode(Image.new("RGB", (20, 9), "white")), Kind.blank),
    "clear.png": (encode(Image.new("RGBA", (20, 9))), Kind.blank),
    "pixel.png": (encode(Image.new("L", (1, 1))), Kind.blank),
    "grey16.png": (png16(0, np.arange(180).reshape(9, 20) * 300), Kind.deep),
    "rgb16.png": (png16(2, np.arange(540).reshape(9, 20, 3) * 121), Kind.deep),
    "alpha16.png": (png16(4, np.arange(360).reshape(9, 20, 2) * 121), Kind.deep),
    "rgba16.png": (png16(6, np.arange(720).reshape(9, 20, 4) * 91), Kind.deep),
    "grey16.tif": (
        encode(Image.fromarray(np.arange(180, dtype=np.uint16).reshape(9, 20)), "TIFF"),
        Kind.deep,
    ),
    "float.tif": (encode(noise(20, 9).convert("F"), "TIFF"), Kind.deep),
    "lzw16.tif": (
        encode(
            Image.fromarray(np.arange(180, dtype=np.uint16).reshape(9, 20)), "TIFF", compression="tiff_lzw"
        ),
        Kind.deep,
    ),
    "a_gif.jpg": (encode(noise(20, 9), "GIF"), Kind.wrong_extension),
    "a_jpeg.PNG": (encode(noise(20, 9), "JPEG"), Kind.wrong_extension),
    "a_webp.jpeg": (encode(noise(20, 9), "WEBP"), Kind.wrong_extension),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_has_no_finding(name: str):
    found = inspect_image(GOOD[name], name)
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "tiff": "TIFF"}
    suffix = name.split(".")[1]
    assert found == Inspection(kinds.get(suffix, suffix.upper()), 20, 9, None)
    for other in ("a", "a.", "a.JPE" if found.format == "JPEG" else "a.jpg.part", ".png", "a.b/c"):
        assert inspect_image(GOOD[name], other).oddities == ()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_used_and_says_what_is_odd(name: str):
    content, kind = ODD[name]
    found = inspect_image(content, name)
    assert found.problem is None
    assert [odd for odd, _ in found.oddities] == [kind]
    assert not kind.quarantines
    assert found.oddities[0][1].endswith(".")
    assert decode_image(content).size == (found.width, found.height)


def test_all_oddities_of_an_image_are_named():
    content = encode(Image.new("CMYK", (20, 9)), "JPEG")
    assert [kind for kind, _ in inspect_image(content, "a.png").oddities] == [
        Kind.wrong_extension,
        Kind.cmyk,
        Kind.blank,
    ]


def test_an_image_with_one_odd_pixel_is_not_blank():
    image = Image.new("RGB", (101, 67), "white")
    image.putpixel((3, 1), (255, 255, 254))
    assert inspect_image(encode(image), "a.png").oddities == ()


def test_what_happens_to_more_than_8_bits():
    """PIL clips grey at 255, most of such an image is white; of colours it takes the upper 8 bits."""
    grey = np.array([[0, 1, 254, 255, 256, 30_000, 65_535, 700]])
    assert np.asarray(decode_image(png16(0, grey)))[0, :, 0].tolist() == [0, 1, 254, 255, 255, 255, 255, 255]
    (_, reason), *_ = inspect_image(png16(0, grey), "a.png").oddities
    assert reason == "more than 8 bits a pixel, clipped at 255 and not scaled: 62% of it is white."
    colours = np.array([[[0, 255, 256], [511, 512, 65_535]]])
    assert np.asarray(decode_image(png16(2, colours)))[0].tolist() == [[0, 0, 1], [1, 2, 255]]
    (_, reason), *_ = inspect_image(png16(2, colours), "a.png").oddities
    assert reason == "16 bits a channel; the upper 8 are used."


def zeros(size: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


SMALL = struct.pack(">IIBB", 8, 8, 8, 0)
PIXELS = (b"IDAT", zlib.compress(bytes(72)))
BAD = {
    "nothing": (b"", Kind.empty_file, "the file is empty"),
    "text": (b"<html>404</html>", Kind.not_an_image, "not an image in any of JPEG, PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Kind.not_an_image, "not an image"),
    "half a jpeg": (GOOD["a.jpg"][:-200], Kind.damaged, "truncated"),
    "start of a jpeg": (GOOD["a.jpg"][:40], Kind.damaged, "truncated"),
    "start of a png": (GOOD["a.png"][:20], Kind.damaged, "truncated"),
    "a jpeg of letters": (b"\xff\xd8\xff" + b"x" * 90, Kind.damaged, "begins like JPEG"),
    "a webp of letters": (b"RIFF0000WEBPVP8 " + b"x" * 90, Kind.damaged, ""),
    "half a webp": (GOOD["a.webp"][:-100], Kind.damaged, ""),
    "half a tiff": (GOOD["a.tif"][:-100], Kind.damaged, ""),
    "png of 10^9 pixels": (
        png(struct.pack(">IIBB", 31_623, 31_623, 8, 6), (b"IDAT", zeros(1 << 20))),
        Kind.too_large,
        "pixels; at most 89478485",
    ),
    "png of 10^8 pixels": (
        png(struct.pack(">IIBB", 10_000, 10_000, 1, 0), (b"IDAT", zeros(1 << 20))),
        Kind.too_large,
        "10000 x 10000 pixels; at most 89478485",
    ),
    "png of a negative size": (png(struct.pack(">IIBB", 2**32 - 1, 9, 8, 0), PIXELS), Kind.too_large, ""),
    "png of no size": (png(struct.pack(">IIBB", 0, 9, 8, 0), PIXELS), Kind.damaged, ""),
    "strip": (encode(Image.new("L", (5000, 1))), Kind.too_long, "5000 x 1 pixels; at most 200:1"),
    "zTXt bomb": (png(SMALL, (b"zTXt", b"a\0\0" + zeros(1 << 28)), PIXELS), Kind.damaged, "too large"),
    "iTXt bomb": (
        png(SMALL, (b"iTXt", b"a\0\1\0\0\0" + zeros(1 << 28)), PIXELS),
        Kind.damaged,
        "too large",
    ),
    "tEXt of 80 MB": (png(SMALL, *[(b"tEXt", b"a\0" + bytes(1 << 20))] * 80, PIXELS), Kind.damaged, ""),
    "iCCP bomb": (png(SMALL, (b"iCCP", b"a\0\0" + zeros(1 << 28)), PIXELS), Kind.damaged, "too large"),
    "text behind the pixels": (
        png(SMALL, PIXELS, (b"zTXt", b"a\0\0" + zeros(1 << 28))),
        Kind.damaged,
        "too large",
    ),
    "gif of 4 * 10^9 pixels": (
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + GOOD["a.gif"][10:],
        Kind.too_large,
        "pixels",
    ),
    "bmp of 10^9 pixels": (
        GOOD["a.bmp"][:18] + struct.pack("<ii", 32_000, 32_000) + GOOD["a.bmp"][26:],
        Kind.too_large,
        "pixels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_a_finding_of_its_kind(name: str):
    content, kind, reason = BAD[name]
    found = inspect_image(content, "a.png")
    assert found.problem is not None
    assert found.problem[0] is kind
    assert kind.quarantines
    assert reason in found.problem[1]
    assert found.oddities == ()
    with pytest.raises(SampleError) as caught:
        decode_image(content)
    assert (caught.value.kind, caught.value.reason) == found.problem


def test_too_little_memory_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def load(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert inspect_image(GOOD["a.png"], "a.png").problem == (
        Kind.too_large,
        "decoding it takes more memory than there is.",
    )


def test_colour_profiles_change_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert inspect_image(encode(noise(9, 9), icc_profile=profile), "a.png").oddities == ()


QUIET = """
import sys
from pathlib import Path
from morebench.data.inspection import inspect_image
for path in Path(sys.argv[1]).iterdir():
    content = path.read_bytes()
    for cut in (0, 30, 60, 100, 200):
        inspect_image(content[:cut] + content[cut + 2:], path.name)
    if inspect_image(content, path.name).problem:
        print(path.name)
"""


@pytest.mark.parametrize("filters", ["default", "error"])
def test_no_warning_leaks_or_counts_as_damage(tmp_path: Path, filters: str):
    """libtiff writes to the standard error by itself."""
    wanted = {"palette.png": GOOD["palette.png"], "10^8.png": BAD["png of 10^8 pixels"][0]}
    for name, content in (wanted | GOOD).items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-W", filters, "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "10^8.png\n")
    assert "Warning" not in done.stderr


def problem_of_reading(path: Path) -> tuple[Kind, str]:
    with pytest.raises(SampleError) as caught:
        read_image(path)
    return caught.value.kind, caught.value.reason


def test_only_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "file.png").write_bytes(b"12345")
    assert problem_of_reading(tmp_path / "pipe.png") == (Kind.unreadable, "not a file.")
    assert problem_of_reading(tmp_path / "folder.png") == (Kind.unreadable, "not a file.")
    assert problem_of_reading(Path("/dev/zero")) == (Kind.unreadable, "not a file.")
    assert problem_of_reading(tmp_path / "loop.png")[0] is Kind.unreadable
    assert problem_of_reading(tmp_path / ("x" * 300)) == (Kind.unreadable, "File name too long.")
    assert problem_of_reading(tmp_path / "broken.png") == (Kind.missing, "No such file or directory.")
    assert problem_of_reading(tmp_path / "file.png" / "a.png")[0] is Kind.missing
    assert read_image(tmp_path / "file.png") == b"12345"
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 4)
    monkeypatch.setattr(Path, "read_bytes", None)  # would fail if called
    assert problem_of_reading(tmp_path / "file.png") == (
        Kind.too_large,
        "a file of 5 bytes; at most 4 are read.",
    )


SEEDS = [*GOOD.values(), *(content for content, _ in ODD.values())]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 5))):
        near = draw(st.sampled_from([60, len(content)]))  # headers are at the front
        at = draw(st.integers(0, min(near, len(content))))
        until = draw(st.integers(at, min(len(content), at + draw(st.sampled_from([0, 1, 4, 400])))))
        content[at:until] = draw(st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, b"\0" * 4]))
    return bytes(content)


@given(content=mutated() | st.binary(max_size=64), name=st.sampled_from(["a.jpg", "a.gif", "a"]))
@settings(max_examples=600, deadline=None)
def test_any_bytes_are_an_image_or_a_finding(content: bytes, name: str):
    found = inspect_image(content, name)
    image, problem = None, None
    try:
        image = decode_image(content)
    except SampleError as error:
        problem = error.kind, error.reason
    assert found.problem == problem
    if problem is not None:
        assert problem[0].quarantines
        assert problem[1].endswith(".")
        problem[1].encode()
    elif image is not None:
        assert image.mode == "RGB"
        assert (found.width, found.height) == image.size
        assert found.format in images.FORMATS
        assert not any(kind.quarantines for kind, _ in found.oddities)
