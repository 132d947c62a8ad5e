"""transformers' vision models with random weights, and the same weights as timm and open_clip name them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from morebench.config.compose import compose_config
from morebench.models.normalise import Normalise

composed = cache(compose_config)  # of a tuple of overrides; to be read, not changed

MODEL_TYPES = {
    "clip": "clip_vision_model",
    "dinov2": "dinov2",
    "dinov2_reg": "dinov2_with_registers",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip_vision_model",
}


def normalise_of(choice: str) -> Normalise:
    return Normalise(composed((f"vision={choice}",)).config.vision.image)


def random_pixels(num_images: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """uint8 `[I, H, W, 3]`"""
    return torch.randint(0, 256, (num_images, size, size, 3), dtype=torch.uint8, generator=generator)


def stock_model(name: str, shape: dict[str, Any]) -> PreTrainedModel:
    """The whole published architecture: all blocks, final norm, pooling head.

    No tensor is constant, so that one in the wrong place shows; scaled so that features are about 1.
    """
    activation = shape["activation"]
    config = AutoConfig.for_model(
        name,
        image_size=shape.get("pretrain_image_size", shape["image_size"]),
        patch_size=shape["patch_size"],
        hidden_size=shape["width"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["mlp_dim"],
        mlp_ratio=shape["mlp_dim"] // shape["width"],
        num_register_tokens=max(shape["prefix_tokens"] - 1, 0),
        hidden_act="gelu_pytorch_tanh" if activation == "gelu_tanh" else activation,
        layer_norm_eps=shape["norm_eps"],
    )
    with no_init_weights():
        model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        _fill(key, parameter.data, shape["blocks"], generator)
    return model.eval()


def _fill(key: str, parameter: Tensor, blocks: int, generator: torch.Generator) -> None:
    """In place. Attention is sharp enough to depend on positions, and a block adds little to its input."""
    if parameter.dim() == 1:
        scales = key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1", "_after.weight"))
        parameter.normal_(1.0 if scales or "layrnorm.weight" in key else 0.0, 0.2, generator=generator)
    elif "position" in key or "token" in key or "class_embedding" in key:
        parameter.normal_(0.0, 0.5, generator=generator)
    else:
        fan_in = parameter[0].numel()
        adds = any(part in key for part in ("o_proj", "out_proj", "fc2"))
        gain = blocks**-0.5 if adds else 1.5
        parameter.normal_(0.0, gain * fan_in**-0.5, generator=generator)


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
    state = rename(state, names)
    state["proj"] = torch.zeros(model.config.hidden_size, 8)  # into the space shared with text
    return state


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
        "embeddings.mask_token": "mask_token",
        "encoder.layers": "blocks",
        "encoder.layer.": "blocks.",
        "post_layernorm": "norm",
        "layernorm": "norm",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    state = rename(state, names)
    state = {f"attn_pool.{key[5:]}" if key.startswith("head.") else key: t for key, t in state.items()}
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


@torch.no_grad()
def patch_features(model: PreTrainedModel, prefix_tokens: int, pixels: Tensor, layer: int = -2) -> Tensor:
    """What the study fed to its projector: a hidden state of the whole model, prefix tokens dropped."""
    hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    return hidden[layer][:, prefix_tokens:]
