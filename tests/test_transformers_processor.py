"""Pixels of the exported image processor against ours, for the published encoders' processing."""

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from factories_data import FORMATS, chat_format, tokenizer_for
from factories_images import SIZES, assert_near, grey_levels, noise
from factories_vision import normalise_of
from PIL import Image
from transformers import AutoProcessor

from morebench.config.compose import compose_config, load_shape
from morebench.config.schema import AspectRatio
from morebench.data.image_processor import ImageProcessor
from morebench.data.images import load_image
from morebench.data.jinja_template import chat_template
from morebench.data.records import IMAGE_TOKEN
from morebench.errors import ConfigError
from morebench.models.transformers_processor import (
    check_ids,
    image_processor,
    make_processor,
    nearest_backend,
    with_image_token,
)

CHOICES = ["clip", "dinov2", "siglip", "siglip2"]
NUM_VISUAL_TOKENS = {"clip": 576, "dinov2": 256, "siglip": 729, "siglip2": 729}


def encoder_pixels(choice: str, ours: ImageProcessor, image: Image.Image) -> np.ndarray:
    """float32 [3, S, S]: what the cell's vision encoder gets."""
    return normalise_of(choice)(torch.from_numpy(ours(image)[None]))[0].numpy()


def exported(choice: str, stem: str, folder: Path, backend: str) -> Any:
    """The cell's processor, read back from disk."""
    vision = compose_config([f"vision={choice}"]).config.vision
    shape = load_shape(vision.shape)
    encoder: Any = SimpleNamespace(
        image_size=shape["image_size"],
        num_prefix_tokens=shape["prefix_tokens"],
        num_visual_tokens=(shape["image_size"] // shape["patch_size"]) ** 2,
    )
    chat, tokenizer = chat_format(stem), tokenizer_for(stem)
    own = with_image_token(tokenizer, chat)
    template = chat_template(chat, own)
    processor = make_processor(template, own, vision.image, AspectRatio.pad, encoder, shape["patch_size"])
    check_ids(processor, chat, tokenizer, encoder.num_visual_tokens, template.exact_history)
    processor.save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, backend=backend)


@pytest.mark.parametrize("aspect_ratio", AspectRatio)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_pil_back_end_is_near(choice: str, aspect_ratio: AspectRatio) -> None:
    vision = compose_config([f"vision={choice}"]).config.vision
    size = load_shape(vision.shape)["image_size"]
    theirs = image_processor(vision.image, aspect_ratio, size)
    ours = ImageProcessor(vision.image, size, aspect_ratio)
    for image in (noise(*size) for size in SIZES):
        found = grey_levels(vision.image, theirs(image, return_tensors="np")["pixel_values"][0])
        assert_near(found, ours(image))
        if nearest_backend(vision.image) == "pil":
            assert np.abs(found - ours(image)).max() < 1.01  # the README's number


@pytest.mark.parametrize("choice", CHOICES)
def test_the_torchvision_back_end_gives_our_pixels(choice: str, tmp_path: Path) -> None:
    vision = compose_config([f"vision={choice}"]).config.vision
    processor = exported(choice, "llama_3_1", tmp_path, "torchvision")
    ours = ImageProcessor(vision.image, processor.image_processor.crop_size["height"], AspectRatio.pad)
    if nearest_backend(vision.image) == "pil" and not resizes_bilinear_in_integers():
        pytest.skip("on this CPU torchvision resizes bilinear in floats")
    for image in (noise(*size) for size in SIZES):
        found = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found, encoder_pixels(choice, ours, image), rtol=0, atol=2e-6)


def resizes_bilinear_in_integers() -> bool:
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vectors or platform.machine() in ("aarch64", "arm64")


@pytest.mark.parametrize("choice", CHOICES)
def test_an_image_has_as_many_tokens_as_we_count(choice: str, tmp_path: Path) -> None:
    processor = exported(choice, "llama_3_1", tmp_path, "pil")
    text = processor.apply_chat_template([{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat?"}])
    inputs = processor(text=text, images=noise(40, 30), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == NUM_VISUAL_TOKENS[choice]
    counted = processor._get_num_multimodal_tokens(image_sizes=[(30, 40)])  # what servers plan with
    assert counted["num_image_tokens"] == [NUM_VISUAL_TOKENS[choice]]


@pytest.mark.parametrize("stem", FORMATS)
def test_prompts_with_an_image_read_back(stem: str, tmp_path: Path) -> None:
    processor = exported("dinov2", stem, tmp_path, "pil")
    content = [{"type": "image", "image": noise(40, 30)}, {"type": "text", "text": "What is this?"}]
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = chat_format(stem).encode_prompt(f"{IMAGE_TOKEN}\nWhat is this?", tokenizer_for(stem), 256)
    expected = torch.from_numpy(ours.input_ids).long()
    expected[torch.from_numpy(ours.visual_mask)] = processor.image_token_id
    assert found["input_ids"][0].tolist() == expected.tolist()


def test_an_image_opened_as_the_readme_says_is_read_as_stored(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    noise(40, 30).save(tmp_path / "turned.jpg", exif=turned)
    palette = noise(40, 30).quantize(16)
    palette.info["transparency"] = 3
    palette.save(tmp_path / "palette.png")
    processor = exported("clip", "llama_3_1", tmp_path / "out", "torchvision")
    ours = ImageProcessor(compose_config(["vision=clip"]).config.vision.image, 336, AspectRatio.pad)
    for name in ("turned.jpg", "palette.png"):
        content = [{"type": "image", "image": Image.open(tmp_path / name).convert("RGB")}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="np"
        )
        expected = encoder_pixels("clip", ours, load_image(tmp_path / name))
        np.testing.assert_allclose(found["pixel_values"][0], expected, rtol=0, atol=2e-6)


def test_other_ids_than_ours_are_noticed(tmp_path: Path) -> None:
    processor = exported("dinov2", "gemma_2", tmp_path, "pil")
    chat, tokenizer = chat_format("gemma_2"), tokenizer_for("gemma_2")
    processor.chat_template = processor.chat_template.replace("user\\n", "user ")
    with pytest.raises(ConfigError, match=r"Gemma-2.*differ from position \d+"):
        check_ids(processor, chat, tokenizer, 256, exact_history=True)
