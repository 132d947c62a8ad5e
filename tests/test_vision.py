"""Each provider's features against the second-to-last hidden states of transformers' full model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, PreTrainedModel

from morebench.config.compose import build, compose_config, load_shape
from morebench.errors import WeightsError
from morebench.models.vision import OpenClipEncoder, TimmEncoder, TransformersEncoder

BLOCKS = 3
CLIP = {"image_size": 24, "prefix_tokens": 1, "activation": "quick_gelu", "norm_eps": 1e-5}
SIGLIP = {"image_size": 28, "prefix_tokens": 0, "activation": "gelu_tanh", "norm_eps": 1e-6}  # 28 = 3 * 8 + 4
DINOV2 = {"image_size": 24, "prefix_tokens": 1, "activation": "gelu", "norm_eps": 1e-6, "layer_scale": True}
DINOV2 |= {"pretrain_image_size": 56, "position_antialias": False}
DINOV2_REG = DINOV2 | {"prefix_tokens": 5, "position_antialias": True}
for _shape in (CLIP, SIGLIP, DINOV2, DINOV2_REG):
    _shape.update({"patch_size": 8, "width": 32, "blocks": BLOCKS, "heads": 2, "mlp_dim": 64})

SHAPES = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
SHAPES |= {"dinov2": DINOV2, "dinov2_with_registers": DINOV2_REG}


def stock_model(name: str) -> PreTrainedModel:
    shape = SHAPES[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(
        AutoConfig.for_model(
            name,
            image_size=shape.get("pretrain_image_size", shape["image_size"]),
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            intermediate_size=64,
            mlp_ratio=2,
            layer_norm_eps=shape["norm_eps"],
        )
    )
    for parameter in model.parameters():  # zeros and ones would hide a tensor in the wrong place
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def expected_features(model: PreTrainedModel, name: str, pixels: Tensor) -> Tensor:
    hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == BLOCKS + 1
    return hidden[-2][:, SHAPES[name]["prefix_tokens"] :]


def rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def join_qkv(state: dict[str, Tensor], attention: str, joined: str) -> dict[str, Tensor]:
    """`<attention>.{q,k,v}_proj.weight` become one tensor `<joined>`, with `{}` for weight or bias."""
    out = dict(state)
    for key in state:
        if f"{attention}.q_proj" in key:
            before, kind = key.split(f"{attention}.q_proj.")
            qkv = [out.pop(f"{before}{attention}.{letter}_proj.{kind}") for letter in "qkv"]
            out[before + joined.format(kind)] = torch.cat(qkv)
    return out


def as_open_clip(model: PreTrainedModel) -> dict[str, Tensor]:
    state = join_qkv(model.state_dict(), "self_attn", "attn.in_proj_{}")
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    return {f"visual.{key}": tensor for key, tensor in rename(state, names).items()}


def as_timm(model: PreTrainedModel) -> dict[str, Tensor]:
    state = join_qkv(model.state_dict(), "self_attn", "attn.qkv.{}")
    state = join_qkv(state, "attention", "attn.qkv.{}")
    names = {
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "encoder.layers": "blocks",
        "encoder.layer.": "blocks.",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    state = rename(state, names)
    if state["pos_embed"].dim() == 2:
        state["pos_embed"] = state["pos_embed"][None]
    if "reg_token" in state:  # timm adds the class token's position once and for all
        class_position, state["pos_embed"] = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
        state["cls_token"] = state["cls_token"] + class_position
    return state


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in state.items()}, folder / "model.safetensors"
    )
    return folder


def pixels_for(name: str) -> Tensor:
    size = SHAPES[name]["image_size"]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_open_clip_equals_transformers(tmp_path: Path) -> None:
    model, pixels = stock_model("clip_vision_model"), pixels_for("clip_vision_model")
    encoder = OpenClipEncoder(CLIP, saved(as_open_clip(model), tmp_path)).eval()
    torch.testing.assert_close(encoder(pixels), expected_features(model, "clip_vision_model", pixels))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize("name", ["siglip_vision_model", "dinov2", "dinov2_with_registers"])
def test_timm_equals_transformers(name: str, prefix: str, tmp_path: Path) -> None:
    model, pixels = stock_model(name), pixels_for(name)
    state = {prefix + key: tensor for key, tensor in as_timm(model).items()}
    encoder = TimmEncoder(SHAPES[name], saved(state, tmp_path)).eval()
    torch.testing.assert_close(encoder(pixels), expected_features(model, name, pixels))


@torch.no_grad()
@pytest.mark.parametrize("name", list(SHAPES))
def test_transformers_loses_only_what_is_not_needed(name: str, tmp_path: Path) -> None:
    model, pixels = stock_model(name), pixels_for(name)
    model.save_pretrained(tmp_path)
    encoder = TransformersEncoder(SHAPES[name], tmp_path, name=name).eval()
    torch.testing.assert_close(encoder(pixels), expected_features(model, name, pixels))


@torch.no_grad()
def test_transformers_reads_the_tower_out_of_a_whole_clip(tmp_path: Path) -> None:
    vision = stock_model("clip_vision_model").config.to_dict()
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path)
    encoder = TransformersEncoder(CLIP, tmp_path, name="clip_vision_model").eval()
    pixels = pixels_for("clip_vision_model")
    torch.testing.assert_close(
        encoder(pixels), expected_features(whole.vision_model, "clip_vision_model", pixels)
    )


@pytest.mark.parametrize(
    ("encoder_class", "shape", "options"),
    [
        (OpenClipEncoder, CLIP, {}),
        (TimmEncoder, DINOV2_REG, {}),
        (TransformersEncoder, SIGLIP, {"name": "siglip_vision_model"}),
    ],
)
def test_sizes_are_what_comes_out(encoder_class: Any, shape: dict[str, Any], options: dict[str, Any]) -> None:
    encoder = encoder_class(shape, None, **options)
    features = encoder(torch.zeros(1, 3, encoder.image_size, encoder.image_size))
    assert features.shape == (1, encoder.num_visual_tokens, encoder.feature_dim)
    blocks = {key.split("blocks.")[-1].split("layers.")[-1].split(".")[0] for key in encoder.state_dict()}
    assert {key for key in blocks if key.isdigit()} == {"0", "1"}


def test_misfitting_weights_are_all_named(tmp_path: Path) -> None:
    state = as_timm(stock_model("siglip_vision_model"))
    del state["blocks.0.attn.qkv.weight"]
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        TimmEncoder(SIGLIP, saved(state, tmp_path))
    assert "blocks.0.attn.qkv.weight: missing" in str(caught.value)
    assert "blocks.1.mlp.fc1.bias: shape [7], expected [64]" in str(caught.value)


def test_weights_of_another_provider_are_refused(tmp_path: Path) -> None:
    saved(as_timm(stock_model("siglip_vision_model")), tmp_path)
    with pytest.raises(WeightsError, match=r"no checkpoint for VisionTransformer.*vision\.encoder"):
        OpenClipEncoder(CLIP, tmp_path)


def test_transformers_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stock_model("siglip_vision_model").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="do not fit the shape"):
        TransformersEncoder(SIGLIP | {"mlp_dim": 128}, tmp_path, name="siglip_vision_model")
    with pytest.raises(WeightsError, match=r"encoder\.layers\.3.*missing"):
        TransformersEncoder(SIGLIP | {"blocks": 5}, tmp_path, name="siglip_vision_model")


@pytest.mark.parametrize(
    ("choice", "num_visual_tokens", "width"),
    [
        ("clip", 576, 1024),
        ("dinov2", 256, 1024),
        ("dinov2_reg", 256, 1024),
        ("siglip", 729, 1152),
        ("siglip2", 729, 1152),
    ],
)
def test_published_encoders_have_the_published_tokens(
    choice: str, num_visual_tokens: int, width: int
) -> None:
    vision = compose_config([f"vision={choice}"]).config.vision
    shape = load_shape(vision.shape)
    with torch.device("meta"):
        encoder = build(vision.encoder, shape=shape, weights=None)
        features = encoder(torch.zeros(1, 3, shape["image_size"], shape["image_size"]))
    assert (encoder.num_visual_tokens, encoder.feature_dim) == (num_visual_tokens, width)
    assert features.shape == (1, num_visual_tokens, width)
