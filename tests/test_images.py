"""Bit equality with the image processors the study used, and refusal of files nobody can use."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_vision import MODEL_TYPES, composed, normalise_of
from PIL import Image, ImageOps
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb

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
    return composed((f"vision={choice}",)).config.vision.image


def normalised(choice: str, pixels: np.ndarray) -> np.ndarray:
    """What the vision encoder gets of one image."""
    found = normalise_of(choice)(torch.from_numpy(pixels[None].copy()))
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
            assert pixels.shape == (image_size, image_size, 3)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            np.testing.assert_array_equal(normalised(choice, pixels), expected)


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
            found = normalised(choice, ours(load_image(path)))
            np.testing.assert_array_equal(found, expected, err_msg=f"{name}, {aspect_ratio}")


@pytest.mark.parametrize("choice", REFERENCES)
def test_s2_reads_images_at_the_largest_scale(choice: str, files: dict[str, Path]):
    image_size, wanted = REFERENCES[choice][2], processing(choice)
    for aspect_ratio in AspectRatio:
        ours = ImageProcessor(wanted, 3 * image_size, aspect_ratio, scale=3)
        pixels = ours(load_image(files["rgb.jpg"]))
        assert pixels.shape == (3 * image_size, 3 * image_size, 3)
        expected = as_the_study(choice, files["rgb.jpg"], aspect_ratio, scale=3)
        np.testing.assert_array_equal(normalised(choice, pixels), expected)


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
