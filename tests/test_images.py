"""Decoding: RGB as stored, and refusal of files nobody can use."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories_images import noise
from PIL import Image

from morebench.data.images import decode_image, load_image
from morebench.errors import DataError


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_kind_of_image_becomes_rgb_and_exif_is_not_applied():
    for mode in ("L", "P", "RGBA", "1", "I;16", "LA"):
        image = decode_image(encode(Image.new(mode, (6, 4))))
        assert (image.mode, image.size) == ("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate me by a quarter"
    assert decode_image(encode(noise(6, 4), "JPEG", exif=exif)).size == (6, 4)
    for kind in ("GIF", "WEBP", "BMP", "TIFF"):
        assert decode_image(encode(noise(6, 4), kind)).size == (6, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_truncated_image_is_a_data_error_wherever_it_ends(kind: str):
    content = encode(noise(40, 40), kind)
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises(DataError):
            decode_image(content[: int(share * len(content))])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_noise_in_a_file_never_raises_anything_else():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF"):
        content = np.frombuffer(encode(noise(30, 30), kind), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[generator.integers(0, len(content), 20)] = generator.integers(0, 256, 20)
            with suppress(DataError):
                assert decode_image(damaged.tobytes()).mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_strips_are_refused():
    with pytest.raises(DataError, match="pixels"):
        decode_image(encode(Image.new("1", (10_000, 10_000))))
    with pytest.raises(DataError, match="5000 x 1 pixels; at most 200:1"):
        decode_image(encode(Image.new("RGB", (5000, 1))))


def test_loading_names_the_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.png: No such file"):
        load_image(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: the file is empty"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match=r"postscript\.png: not an image in any of"):
        load_image(tmp_path / "postscript.png")
    noise(4, 4).save(tmp_path / "good.png")
    assert load_image(tmp_path / "good.png").size == (4, 4)
