"""Each provider's features against the hidden states of transformers' full model."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from factories_vision import MODEL_TYPES, as_open_clip, as_timm, composed, patch_features, saved, stock_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, CLIPConfig, CLIPModel, ViTForImageClassification

from morebench.config.compose import build, load_shape
from morebench.errors import ConfigError, WeightsError
from morebench.models.vision import OpenClipEncoder, TimmEncoder, TransformersEncoder

BLOCKS = 3
TINY = {"patch_size": 8, "width": 32, "blocks": BLOCKS, "heads": 2, "mlp_dim": 64}
CLIP = TINY | {"image_size": 24, "prefix_tokens": 1, "activation": "quick_gelu", "norm_eps": 1e-5}
SIGLIP = TINY | {
    "image_size": 28,
    "prefix_tokens": 0,
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
}  # 3 * 8 + 4
DINOV2 = TINY | {"image_size": 24, "prefix_tokens": 1, "activation": "gelu", "norm_eps": 1e-6}
DINOV2 |= {"layer_scale": True, "pretrain_image_size": 56, "position_antialias": False}
DINOV2_REG = DINOV2 | {"prefix_tokens": 5, "position_antialias": True}
VIT = CLIP | {"activation": "gelu"}
SHAPES = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
SHAPES |= {"dinov2": DINOV2, "dinov2_with_registers": DINOV2_REG}
OTHERS = {"vit": VIT, "deit": VIT | {"prefix_tokens": 2}, "ijepa": VIT | {"prefix_tokens": 0}, "vit_msn": VIT}
OTHERS |= {"chinese_clip_vision_model": CLIP, "dinov3_vit": VIT | {"prefix_tokens": 5}}
LAYERS = (-1, -2, -3)


def pixels_for(shape: dict[str, Any], images: int = 2) -> Tensor:
    size = shape["image_size"]
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors_of_blocks(encoder: nn.Module) -> set[str]:
    """Numbers of the blocks that hold tensors."""
    keys = [key for key in encoder.state_dict() if "blocks." in key or "layer" in key]
    return {part for key in keys for part in key.split(".") if part.isdigit()}


# the study's encoders


@torch.no_grad()
@pytest.mark.parametrize(
    ("choice", "tokens", "width"),
    [
        ("clip", 576, 1024),
        ("dinov2", 256, 1024),
        ("dinov2_reg", 256, 1024),
        ("siglip", 729, 1152),
        ("siglip2", 729, 1152),
    ],
)
def test_the_encoders_of_the_study_at_their_own_size(
    choice: str, tokens: int, width: int, tmp_path: Path
) -> None:
    """True width, input size and choice; two blocks of the depth (benchmarks/vision_parity.py takes all)."""
    vision = composed((f"vision={choice}",)).config.vision
    shape = load_shape(vision.shape)
    model = stock_model(MODEL_TYPES[choice], shape | {"blocks": BLOCKS})
    state = (as_open_clip if choice == "clip" else as_timm)(model)
    blocks = "transformer.resblocks" if choice == "clip" else "blocks"
    state |= {f"{blocks}.{n}.rest": torch.zeros(1) for n in range(BLOCKS, shape["blocks"])}
    layer = -(shape["blocks"] + 1 - (BLOCKS - 1))  # after the second block
    encoder = build(vision.encoder, shape=shape, weights=saved(state, tmp_path), feature_layer=layer)
    pixels = pixels_for(shape, images=1)
    features, expected = encoder.eval()(pixels), patch_features(model, shape["prefix_tokens"], pixels)
    assert features.shape == (1, tokens, width) == (1, encoder.num_visual_tokens, encoder.feature_dim)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    assert 0.5 < expected.std() < 3
    assert expected.std(dim=1).mean() > 0.3, "patches must differ, or a wrong order would pass"
    assert vision.feature_layer == -2


@pytest.mark.parametrize("choice", list(MODEL_TYPES))
def test_nothing_is_built_that_is_not_read(choice: str) -> None:
    vision = composed((f"vision={choice}",)).config.vision
    shape = load_shape(vision.shape)
    with torch.device("meta"):
        encoder = build(vision.encoder, shape=shape, weights=None, feature_layer=vision.feature_layer)
    width, mlp, patch = shape["width"], shape["mlp_dim"], shape["patch_size"]
    block = 4 * width * (width + 1) + mlp * (width + 1) + width * (mlp + 1) + 4 * width
    block += 2 * width * shape.get("layer_scale", False)
    patches = (shape["image_size"] // patch) ** 2
    registers = max(shape["prefix_tokens"] - 1, 0)
    positions = patches + (shape["prefix_tokens"] == 1)
    embeddings = 3 * patch**2 * width + width * (positions + shape["prefix_tokens"])
    embeddings += 2 * width if choice == "clip" else width  # CLIP: a norm; others: a bias of the patches
    assert registers in (0, 4)
    expected = (shape["blocks"] - 1) * block + embeddings
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


# tiny ones: every layer, every provider


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_open_clip_equals_transformers(layer: int, tmp_path: Path) -> None:
    model, pixels = stock_model("clip_vision_model", CLIP), pixels_for(CLIP)
    encoder = OpenClipEncoder(CLIP, saved(as_open_clip(model), tmp_path), feature_layer=layer).eval()
    torch.testing.assert_close(encoder(pixels), patch_features(model, 1, pixels, layer))
    assert tensors_of_blocks(encoder) == {str(n) for n in range(BLOCKS + 1 + layer)}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["siglip_vision_model", "dinov2", "dinov2_with_registers"])
def test_timm_equals_transformers(name: str, layer: int, prefix: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    model, pixels = stock_model(name, shape), pixels_for(shape)
    state = {prefix + key: tensor for key, tensor in as_timm(model).items()}
    encoder = TimmEncoder(shape, saved(state, tmp_path), feature_layer=layer).eval()
    expected = patch_features(model, shape["prefix_tokens"], pixels, layer)
    torch.testing.assert_close(encoder(pixels), expected)
    assert tensors_of_blocks(encoder) == {str(n) for n in range(BLOCKS + 1 + layer)}


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
def test_any_vit_of_transformers(name: str, layer: int, tmp_path: Path) -> None:
    shape = (SHAPES | OTHERS)[name]
    model, pixels = stock_model(name, shape), pixels_for(shape)
    model.save_pretrained(tmp_path)
    encoder = TransformersEncoder(shape, tmp_path, feature_layer=layer, name=name).eval()
    expected = patch_features(model, shape["prefix_tokens"], pixels, layer)
    torch.testing.assert_close(encoder(pixels), expected)
    unread = [key for key in encoder.state_dict() if any(part in key for part in ("pool", "head", "post_"))]
    assert not unread
    assert "model.layernorm.weight" not in encoder.state_dict()


@torch.no_grad()
def test_the_position_flag_matters_and_each_model_takes_its_own(tmp_path: Path) -> None:
    """Plain DINOv2 resamples its grid without antialiasing, with registers it does."""
    for name, shape in (("dinov2", DINOV2), ("dinov2_with_registers", DINOV2_REG)):
        model, pixels = stock_model(name, shape), pixels_for(shape)
        folder = saved(as_timm(model), tmp_path)
        flipped = shape | {"position_antialias": not shape["position_antialias"]}
        features = TimmEncoder(flipped, folder, feature_layer=-2).eval()(pixels)
        difference = features - patch_features(model, shape["prefix_tokens"], pixels)
        assert difference.abs().max() > 0.1
    for choice, antialias in (("dinov2", False), ("dinov2_reg", True)):
        assert load_shape(f"vision/{choice}.json")["position_antialias"] is antialias


# what checkpoints hold beside the tower


def whole_clip() -> CLIPModel:
    text = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
    vision = stock_model("clip_vision_model", CLIP).config.to_dict()
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()


@torch.no_grad()
def test_transformers_reads_the_tower_out_of_a_whole_clip(tmp_path: Path) -> None:
    whole = whole_clip()
    whole.save_pretrained(tmp_path)
    encoder = TransformersEncoder(CLIP, tmp_path, feature_layer=-2, name="clip_vision_model").eval()
    pixels = pixels_for(CLIP)
    torch.testing.assert_close(encoder(pixels), patch_features(whole.vision_model, 1, pixels))


@torch.no_grad()
def test_open_clip_reads_the_tower_out_of_a_whole_clip(tmp_path: Path) -> None:
    """The text tower's blocks carry the image tower's names, without `visual.`, and may be as wide."""
    whole = whole_clip()
    text = as_open_clip(whole.text_model)
    tower = {f"visual.{key}": tensor for key, tensor in as_open_clip(whole.vision_model).items()}
    shared = {key for key in text if "resblocks.0." in key}
    assert {key.removeprefix("visual.") for key in tower} >= shared
    saved({**text, **tower, "logit_scale": torch.ones(1)}, tmp_path)
    encoder = OpenClipEncoder(CLIP, tmp_path, feature_layer=-2).eval()
    pixels = pixels_for(CLIP)
    torch.testing.assert_close(encoder(pixels), patch_features(whole.vision_model, 1, pixels))


@torch.no_grad()
def test_open_clip_s_own_whole_clip(tmp_path: Path) -> None:
    """Its own names for everything, as in its published checkpoints."""
    torch.manual_seed(0)
    vision = {
        "layers": BLOCKS,
        "width": 32,
        "head_width": 16,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 24,
    }
    text = {"context_length": 7, "vocab_size": 10, "width": 32, "heads": 2, "layers": 5}
    whole = open_clip.model.CLIP(8, vision, text, quick_gelu=True).eval()
    seen: list[Tensor] = []
    whole.visual.transformer.resblocks[-2].register_forward_hook(lambda _, __, out: seen.append(out))
    encoder = OpenClipEncoder(CLIP, saved(whole.state_dict(), tmp_path), feature_layer=-2).eval()
    whole.visual(pixels_for(CLIP))
    torch.testing.assert_close(encoder(pixels_for(CLIP)), seen[0][:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("choice", ["dinov2", "dinov2_reg", "siglip", "siglip2"])
def test_timm_s_own_whole_models(choice: str, tmp_path: Path) -> None:
    """Named as in conf/vision, with their heads."""
    shape = SHAPES[MODEL_TYPES[choice]]
    name = composed((f"vision={choice}",)).config.vision.encoder["name"]
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": BLOCKS, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    sizes["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
    activation = {"gelu_tanh": partial(nn.GELU, approximate="tanh"), "gelu": nn.GELU}[shape["activation"]]
    whole = timm.create_model(name, img_size=shape["image_size"], act_layer=activation, **sizes).eval()
    native = {key: shape[key] for key in shape if key not in ("pretrain_image_size", "position_antialias")}
    folder = saved(whole.state_dict(), tmp_path)
    encoder = TimmEncoder(native, folder, feature_layer=-2, name=name).eval()
    pixels = pixels_for(shape)
    (expected,) = whole.forward_intermediates(
        pixels, indices=[BLOCKS - 2], norm=False, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(encoder(pixels), expected)


@torch.no_grad()
def test_a_classifier_is_legitimate(tmp_path: Path) -> None:
    """It has no pooler, which is not read either."""
    whole = ViTForImageClassification(stock_model("vit", VIT).config).eval()
    whole.save_pretrained(tmp_path)
    encoder = TransformersEncoder(VIT, tmp_path, feature_layer=-2, name="vit").eval()
    pixels = pixels_for(VIT)
    torch.testing.assert_close(encoder(pixels), patch_features(whole.vit, 1, pixels))


@pytest.mark.parametrize("provider", ["open_clip", "timm", "transformers"])
def test_a_tensor_without_a_place_is_refused(provider: str, tmp_path: Path) -> None:
    model = stock_model(shape=DINOV2, name="dinov2")
    if provider == "transformers":
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state |= {f"encoder.layer.{n}.surprise": torch.ones(1) for n in range(BLOCKS)}
        state["embeddings.surprise"] = torch.ones(1)
        saved(state, tmp_path)
        with pytest.raises(WeightsError) as caught:
            TransformersEncoder(DINOV2, tmp_path, feature_layer=-2, name="dinov2")
        assert "encoder.layer.*.surprise: 2 in the file" in str(caught.value)
        assert "embeddings.surprise: 1 in the file" in str(caught.value)
    elif provider == "timm":
        without = {key: value for key, value in DINOV2.items() if key != "layer_scale"}
        with pytest.raises(WeightsError, match=r"blocks\.\*\.ls1\.gamma: 2 in the file") as caught:
            TimmEncoder(without, saved(as_timm(model), tmp_path), feature_layer=-2)
        assert "ls2" in str(caught.value)
    else:
        state = as_open_clip(stock_model("clip_vision_model", CLIP)) | {"conv1.bias": torch.ones(32)}
        with pytest.raises(WeightsError, match=r"conv1\.bias: 1 in the file, which the encoder has no place"):
            OpenClipEncoder(CLIP, saved(state, tmp_path), feature_layer=-2)


@pytest.mark.parametrize("wrong", [2, 4])
def test_another_number_of_blocks_is_refused(wrong: int, tmp_path: Path) -> None:
    """Layers are counted from the end: one block more and -2 would be another layer."""
    match = f"{BLOCKS} blocks, but the shape says {wrong}"
    clip, siglip = stock_model("clip_vision_model", CLIP), stock_model("siglip_vision_model", SIGLIP)
    with pytest.raises(WeightsError, match=match):
        OpenClipEncoder(CLIP | {"blocks": wrong}, saved(as_open_clip(clip), tmp_path), feature_layer=-2)
    with pytest.raises(WeightsError, match=match):
        TimmEncoder(SIGLIP | {"blocks": wrong}, saved(as_timm(siglip), tmp_path), feature_layer=-2)
    siglip.save_pretrained(tmp_path)
    for expected in (f"num_hidden_layers: 3 in config.json, {wrong}", match):
        with pytest.raises(WeightsError, match=expected):
            TransformersEncoder(
                SIGLIP | {"blocks": wrong}, tmp_path, feature_layer=-2, name="siglip_vision_model"
            )
        (tmp_path / "config.json").unlink(missing_ok=True)


def test_misfitting_weights_are_all_named(tmp_path: Path) -> None:
    state = as_timm(stock_model("siglip_vision_model", SIGLIP))
    del state["blocks.0.attn.qkv.weight"]
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        TimmEncoder(SIGLIP, saved(state, tmp_path), feature_layer=-2)
    assert "blocks.0.attn.qkv.weight: missing" in str(caught.value)
    assert "blocks.1.mlp.fc1.bias: shape [7], expected [64]" in str(caught.value)


def test_a_position_grid_is_resampled_only_where_the_shape_says_so(tmp_path: Path) -> None:
    folder = saved(as_timm(stock_model("dinov2", DINOV2)), tmp_path)
    native = {key: DINOV2[key] for key in DINOV2 if key not in ("pretrain_image_size", "position_antialias")}
    for shape in (native, DINOV2 | {"pretrain_image_size": 48}):
        with pytest.raises(WeightsError, match=r"pos_embed: shape \[1, 50, 32\], expected \[1, 10, 32\]"):
            TimmEncoder(shape, folder, feature_layer=-2)


def test_files_that_contradict_each_other_or_are_damaged(tmp_path: Path) -> None:
    state = as_open_clip(stock_model("clip_vision_model", CLIP))
    path = saved(state, tmp_path) / "model.safetensors"
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"conv1\.weight: both in copy\.safetensors and in model"):
        OpenClipEncoder(CLIP, tmp_path, feature_layer=-2)
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"copy\.safetensors is damaged"):
        OpenClipEncoder(CLIP, tmp_path, feature_layer=-2)


def test_weights_of_another_provider_are_refused(tmp_path: Path) -> None:
    saved(as_timm(stock_model("siglip_vision_model", SIGLIP)), tmp_path)
    with pytest.raises(WeightsError, match=r"no checkpoint for VisionTransformer.*vision\.encoder"):
        OpenClipEncoder(CLIP, tmp_path, feature_layer=-2)


def test_transformers_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stock_model("siglip_vision_model", SIGLIP).save_pretrained(tmp_path)
    wrong = SIGLIP | {"heads": 4, "activation": "gelu"}  # neither shows in the shape of any tensor
    with pytest.raises(WeightsError) as caught:
        TransformersEncoder(wrong, tmp_path, feature_layer=-2, name="siglip_vision_model")
    assert "num_attention_heads: 2 in config.json, 4" in str(caught.value)
    assert "hidden_act: gelu_pytorch_tanh in config.json, gelu" in str(caught.value)
    with pytest.raises(WeightsError, match=r"model_type: siglip_vision_model in config\.json, clip_vision"):
        TransformersEncoder(CLIP, tmp_path, feature_layer=-2, name="clip_vision_model")
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="do not fit the shape"):
        TransformersEncoder(SIGLIP | {"mlp_dim": 128}, tmp_path, feature_layer=-2, name="siglip_vision_model")


# names and sizes that do not exist


@pytest.mark.parametrize(
    ("encoder_class", "name", "error", "match"),
    [
        (OpenClipEncoder, "ViT-L-14-337-quickgelu", WeightsError, "Nearest: ViT-L-14-336-quickgelu"),
        (OpenClipEncoder, "ViT-SO400M-14-SigLIP-384", WeightsError, "TimmEncoder"),
        (OpenClipEncoder, "RN50", WeightsError, "no ViT of open_clip's own"),
        (OpenClipEncoder, "ViT-L-14-336", WeightsError, "blocks: ViT-L-14-336 has 24, the shape says 3"),
        (TimmEncoder, "vit_large_patch14_dinov3", WeightsError, "Nearest: .*vit_large_patch14_dinov2"),
        (TimmEncoder, "resnet50", WeightsError, "none of the ViTs"),
        (TransformersEncoder, "dinov22", ConfigError, "Nearest: dinov2"),
        (TransformersEncoder, "swin", ConfigError, "no plain ViT"),
    ],
)
def test_names_that_are_no_vit(encoder_class: Any, name: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        encoder_class(CLIP, None, feature_layer=-2, name=name)


def test_tokens_that_the_shape_does_not_announce() -> None:
    """ViT-MAE hides three quarters of the patches, DeiT has a second prefix token."""
    for name, found in (("vit_mae", 3), ("deit", 11)):
        encoder = TransformersEncoder(VIT, None, feature_layer=-2, name=name)
        with pytest.raises(
            ConfigError, match=rf"1 prefix tokens \+ 3 x 3 patches = 10, .* has {found} tokens"
        ):
            encoder(pixels_for(VIT))


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_a_layer_that_the_encoder_has_not(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"feature_layer={layer}, but the encoder has 3 blocks.* to -3"):
        TimmEncoder(SIGLIP, None, feature_layer=layer)


def test_the_layer_of_a_choice_reaches_its_encoder() -> None:
    from morebench.models.parts import build_encoder

    config = composed(("vision=clip_tiny",)).config
    for layer in (-1, -2, -4):
        vision = replace(config.vision, feature_layer=layer)
        encoder = build_encoder(replace(config, vision=vision), None)
        assert len(encoder.model.transformer.resblocks) == 5 + layer


def test_the_stock_models_are_whole() -> None:
    """The reference itself: with a head and a final norm, or there would be nothing to leave out."""
    keys = AutoModel.from_config(stock_model("siglip_vision_model", SIGLIP).config).state_dict()
    assert {"head.probe", "post_layernorm.weight"} <= keys.keys()
