"""Beside the image processors the study used, and the same bytes everywhere."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
from factories_images import (
    SIZES,
    assert_near,
    digest,
    grey_levels,
    noise,
    pad_to_square,
    processing_of,
    with_pillow,
)
from factories_vision import MODEL_TYPES, composed, normalise_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data import image_processor
from morebench.data.image_processor import ImageProcessor, mean_colour
from morebench.data.images import load_image
from morebench.errors import ConfigError

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


def processing(choice: str) -> ImageProcessing:
    return composed((f"vision={choice}",)).config.vision.image


def normalised(choice: str, pixels: np.ndarray) -> np.ndarray:
    """What the vision encoder gets of one image."""
    found = normalise_of(choice)(torch.from_numpy(pixels[None]))
    assert found.is_contiguous()
    return found[0].numpy()


@pytest.mark.parametrize("choice", MODEL_TYPES)
def test_every_value_of_every_channel_is_normalised_as_numpy_does_it(choice: str):
    """The study's processors compute with numpy."""
    image = processing(choice)
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None], 3)  # [256, 3]
    mean, std = np.array([image.mean, image.std], dtype=np.float32)
    expected = (values.astype(np.float32) / 255 - mean) / std
    assert expected.dtype == np.float32
    found = normalised(choice, values.reshape(16, 16, 3))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(3, 256).T.view(np.int32), expected.view(np.int32))


def test_the_constants_are_in_no_file_and_no_cast_rounds_them():
    normalise = normalise_of("clip")
    pixels = torch.arange(192, dtype=torch.uint8).view(1, 8, 8, 3)
    expected = normalise(pixels)
    assert not normalise.state_dict()
    for cast in (torch.bfloat16, torch.float64):
        torch.testing.assert_close(normalise.to(cast)(pixels), expected, rtol=0, atol=0)
    on_meta = normalise_of("clip").to("meta")
    assert on_meta.to_empty(device="cpu")(pixels).equal(expected), "an empty copy holds the numbers"


@pytest.mark.parametrize("given", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_numbers_that_are_not_pixels_are_refused(given: torch.Tensor):
    with pytest.raises(ValueError, match=r"uint8 \[I, H, W, 3\].*found torch\.\w+ \[1, "):
        normalise_of("clip")(given)


@pytest.mark.parametrize("choice", REFERENCES)
def test_nearly_the_pixels_of_the_study_s_processors(choice: str):
    reference, settings, image_size = REFERENCES[choice]
    theirs = reference(**settings)
    for aspect_ratio in AspectRatio:
        ours = ImageProcessor(processing(choice), image_size, aspect_ratio)
        for size in SIZES:
            image = noise(*size)
            given = pad_to_square(image, COLOURS[choice]) if aspect_ratio is AspectRatio.pad else image
            expected = theirs(given, return_tensors="np")["pixel_values"][0]
            pixels = ours(image)
            assert pixels.shape == (image_size, image_size, 3)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            assert_near(pixels, grey_levels(processing(choice), expected))


def write_files(folder: Path) -> dict[str, Path]:
    """One file of every kind that training data have, and of some that they should not have."""
    generator = np.random.default_rng(0)
    palette = Image.frombytes("P", (70, 45), generator.integers(0, 256, 70 * 45, dtype=np.uint8).tobytes())
    palette.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tolist())
    rgba = Image.fromarray(generator.integers(0, 256, (45, 70, 4), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate me by a quarter"
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.jpg": (noise(80, 53), {"quality": 95}),
        "progressive.jpg": (noise(53, 80), {"progressive": True}),
        "cmyk.jpg": (noise(60, 40).convert("CMYK"), {}),
        "grey.jpg": (noise(60, 40).convert("L"), {}),
        "turned.jpg": (noise(90, 40), {"exif": turned}),
        "grey.png": (noise(41, 60).convert("L"), {}),
        "grey_alpha.png": (rgba.convert("LA"), {}),
        "rgba.png": (rgba, {}),
        "palette.png": (palette, {}),
        "palette_one_transparent.png": (palette, {"transparency": 7}),
        "palette_alpha.png": (palette, {"transparency": bytes(range(256))}),
        "palette.gif": (palette, {"transparency": 7}),
        "lossy.webp": (noise(50, 70), {}),
        "one_wide.png": (noise(1, 40), {}),
        "one_high.png": (noise(40, 1), {}),
        "one_pixel.png": (noise(1, 1), {}),
        "large.jpg": (noise(4000, 3000), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in images}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("files"))


def as_the_study(choice: str, path: Path, aspect_ratio: AspectRatio, scale: int = 1) -> np.ndarray:
    """PIL's own `convert("RGB")`, the padding, the Hugging Face processor; under S2 at the largest scale."""
    reference, settings, _ = REFERENCES[choice]
    size = {side: scale * pixels for side, pixels in settings["size"].items()}
    crop = {"crop_size": scale * settings["crop_size"]} if "crop_size" in settings else {}
    image = Image.open(path).convert("RGB")
    # PIL keeps the transparent colour of a palette as a note; transformers 4, which the study ran, left an
    # RGB image alone, transformers 5 turns every pixel of that colour white
    image.info.pop("transparency", None)
    if aspect_ratio is AspectRatio.pad:
        image = pad_to_square(image, COLOURS[choice])
    processor = reference(**settings | {"size": size} | crop)
    # said, not guessed: an image of one or three rows would be taken for channels first
    return processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("choice", REFERENCES)
def test_files_of_every_kind_as_the_study_read_them(choice: str, files: dict[str, Path]):
    image_size = REFERENCES[choice][2]
    for aspect_ratio in AspectRatio:
        ours = ImageProcessor(processing(choice), image_size, aspect_ratio)
        for name, path in files.items():
            expected = as_the_study(choice, path, aspect_ratio)
            found = ours(load_image(path))
            assert_near(found, grey_levels(processing(choice), expected), f"{name}, {aspect_ratio}")


@pytest.mark.parametrize("choice", REFERENCES)
def test_s2_reads_images_at_the_largest_scale(choice: str, files: dict[str, Path]):
    image_size, wanted = REFERENCES[choice][2], processing(choice)
    for aspect_ratio in AspectRatio:
        ours = ImageProcessor(wanted, 3 * image_size, aspect_ratio, scale=3)
        pixels = ours(load_image(files["rgb.jpg"]))
        assert pixels.shape == (3 * image_size, 3 * image_size, 3)
        expected = as_the_study(choice, files["rgb.jpg"], aspect_ratio, scale=3)
        assert_near(pixels, grey_levels(processing(choice), expected))


def test_both_dinov2_see_the_same_pixels():
    assert processing("dinov2_reg") == processing("dinov2")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparency_is_dropped_as_the_study_did(files: dict[str, Path]):
    """transformers 5 lays a transparent image on white instead; the study never gave it one."""
    for name in ("rgba.png", "grey_alpha.png", "palette_one_transparent.png", "palette_alpha.png"):
        stored = Image.open(files[name])
        ours = np.asarray(load_image(files[name]))
        np.testing.assert_array_equal(ours, np.asarray(stored.convert("RGB")))
        assert np.abs(ours.astype(int) - convert_to_rgb(stored, return_numpy=True)).max() > 100
    opaque = Image.open(files["palette.png"])
    np.testing.assert_array_equal(load_image(files["palette.png"]), convert_to_rgb(opaque, return_numpy=True))


def test_the_camera_s_orientation_is_not_applied(files: dict[str, Path]):
    stored = Image.open(files["turned.jpg"])
    assert ImageOps.exif_transpose(stored).size == (40, 90)
    assert load_image(files["turned.jpg"]).size == (90, 40)


@pytest.mark.parametrize("choice", COLOURS)
def test_the_padding_colours_of_the_study(choice: str):
    assert mean_colour(processing(choice)) == COLOURS[choice]


def test_padding_centres_the_image_and_rounds_down():
    wanted = ImageProcessing(
        resize=Resize.squash,
        resize_to=5,
        interpolation=Interpolation.bicubic,
        mean=[0.25, 0.5, 0.75],
        std=[1.0] * 3,
    )
    padded = ImageProcessor(wanted, 5, AspectRatio.pad)
    row = [[63, 127, 191], [255] * 3, [255] * 3, [63, 127, 191], [63, 127, 191]]
    assert padded(Image.new("RGB", (2, 5), "white")).tolist() == [row] * 5
    assert padded(Image.new("RGB", (5, 2), "white")).swapaxes(0, 1).tolist() == [row] * 5


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from(AspectRatio),
    st.sampled_from(Resize),
    st.sampled_from(Interpolation),
    st.integers(0, 20),
)
def test_padding_resizing_and_cropping_as_pillow_does_it(
    size: tuple[int, int],
    aspect_ratio: AspectRatio,
    resize: Resize,
    interpolation: Interpolation,
    margin: int,
):
    wanted = processing_of(resize, 40 + (margin if resize is Resize.shortest_edge else 0), interpolation)
    image = noise(*size)
    found = ImageProcessor(wanted, 40, aspect_ratio)(image).astype(int)
    levels = np.abs(found - with_pillow(image, wanted, 40, aspect_ratio))
    assert levels.max() <= 2
    assert levels.mean() < 0.1  # of 4,800 values from a handful of pixels


@pytest.mark.parametrize("choice", REFERENCES)
def test_photographs_differ_from_pillow_s_in_the_last_bit(choice: str):
    image_size, differ = REFERENCES[choice][2], []
    for source in load_sample_images().images:
        for box in [(0, 0, 640, 427), (0, 0, 500, 375), (100, 0, 420, 427)]:
            image = Image.fromarray(source).crop(box)
            for aspect_ratio in AspectRatio:
                found = ImageProcessor(processing(choice), image_size, aspect_ratio)(image)
                expected = with_pillow(image, processing(choice), image_size, aspect_ratio)
                assert_near(found, expected)
                differ.append((found != expected).mean())
    assert 0 < np.mean(differ) < 0.005


@pytest.mark.parametrize("size", [(150, 11), (11, 150), (90, 60), (60, 61)])
@pytest.mark.parametrize("resize", Resize)
def test_an_image_whose_square_is_too_large_gets_the_same_pixels(
    size: tuple[int, int], resize: Resize, monkeypatch: pytest.MonkeyPatch
):
    for interpolation in Interpolation:
        ours = ImageProcessor(processing_of(resize, 40, interpolation), 40, AspectRatio.pad)
        expected = ours(noise(*size))
        for limit in (3 * max(size), 7 * max(size), 1):
            monkeypatch.setattr(image_processor, "MAX_PIXELS", limit)
            np.testing.assert_array_equal(ours(noise(*size)), expected)
            monkeypatch.undo()


@pytest.mark.parametrize(("resize", "resize_to"), [(Resize.squash, 60), (Resize.shortest_edge, 48)])
def test_a_resize_that_does_not_reach_the_encoder_is_refused(resize: Resize, resize_to: int):
    wanted = processing_of(resize, resize_to, Interpolation.bicubic)
    with pytest.raises(ConfigError, match=f"resize_to={resize_to} .* 56 pixels"):
        ImageProcessor(wanted, 56, AspectRatio.square)


DIGEST = "7e6d0d5f4e6f2603b33c666f511cdf36b87f77d979dca358a406badfede94b72"


def test_the_pixels_never_change():
    """Golden: with torch 2.15 on x86-64. Other bytes need another NUMERICS_VERSION and FEATURES_VERSION."""
    assert digest() == DIGEST


def test_the_pixels_depend_neither_on_the_cpu_nor_on_threads():
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch has no other kernels for this CPU than the portable ones")
    program = Path(__file__).parent / "factories_images.py"
    for threads in "1", "3":
        environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, program], env=environment, stdout=PIPE, text=True, check=True)
        assert run.stdout.split() == ["DEFAULT", digest()]
