"""Bit equality with the image processors the study used, and refusal of files nobody can use."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from morebench.config.compose import compose_config
from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.images import (
    ImageProcessor,
    decode_image,
    load_image,
    mean_colour,
    pad_to_square,
    resolve_inside,
)
from morebench.errors import ConfigError, DataError

SIZES = [(64, 48), (48, 64), (33, 97), (50, 50), (500, 31), (17, 12)]  # width, height
REFERENCES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": 336}, 336),
    "dinov2": (
        BitImageProcessorPil,
        {
            "size": {"shortest_edge": 256},
            "crop_size": 224,
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        224,
    ),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 384, "width": 384}, "resample": 3}, 384),
    "siglip2": (SiglipImageProcessorPil, {"size": {"height": 384, "width": 384}, "resample": 2}, 384),
}
COLOURS = {
    "clip": (122, 116, 104),
    "dinov2": (123, 116, 103),
    "siglip": (127, 127, 127),
    "siglip2": (127, 127, 127),
}


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processing(choice: str) -> ImageProcessing:
    return compose_config([f"vision={choice}"]).config.vision.image


@pytest.mark.parametrize("choice", REFERENCES)
def test_the_same_numbers_as_the_processors_of_the_study(choice: str):
    reference, settings, image_size = REFERENCES[choice]
    theirs = reference(**settings)
    for aspect_ratio in AspectRatio:
        ours = ImageProcessor(processing(choice), image_size, aspect_ratio)
        for size in SIZES:
            image = noise(*size)
            given = pad_to_square(image, COLOURS[choice]) if aspect_ratio is AspectRatio.pad else image
            expected = theirs(given, return_tensors="np")["pixel_values"][0]
            pixels = ours(image)
            assert pixels.shape == (3, image_size, image_size)
            assert pixels.dtype == np.float32
            assert pixels.flags.c_contiguous
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("choice", COLOURS)
def test_the_padding_colours_of_the_study(choice: str):
    assert mean_colour(processing(choice)) == COLOURS[choice]


def test_padding_centres_the_image_and_rounds_down():
    white = Image.new("RGB", (2, 5), "white")
    padded = np.asarray(pad_to_square(white, (1, 2, 3)))
    assert padded.shape == (5, 5, 3)
    assert padded[0].tolist() == [[1, 2, 3], [255] * 3, [255] * 3, [1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(("resize", "resize_to"), [(Resize.squash, 60), (Resize.shortest_edge, 48)])
def test_a_resize_that_does_not_reach_the_encoder_is_refused(resize: Resize, resize_to: int):
    wanted = ImageProcessing(
        resize=resize, resize_to=resize_to, interpolation=Interpolation.bicubic, mean=[0.5] * 3, std=[0.5] * 3
    )
    with pytest.raises(ConfigError, match=f"resize_to={resize_to} .* 56 pixels"):
        ImageProcessor(wanted, 56, AspectRatio.square)


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


@pytest.mark.parametrize("relative", ["/a.png", "../a.png", "a/../../b.png", "a\0.png", "http://x.org/a.png"])
def test_paths_that_leave_the_folder(tmp_path: Path, relative: str):
    with pytest.raises(DataError):
        resolve_inside(tmp_path, relative)


def test_paths_inside_the_folder(tmp_path: Path):
    assert resolve_inside(tmp_path, "coco/train2017/0..1.jpg") == tmp_path / "coco" / "train2017" / "0..1.jpg"
