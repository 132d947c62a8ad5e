"""Tiny ViTs of the real classes, whole: a checkpoint has the last block too, which the MLLM does not read."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from morebench.errors import ConfigError

LOCALITY, VALUE_SCALE = 0.7, 0.4  # alpha and beta of mimetic initialisation
POSITION_SCALE = 0.7


def build_vit(provider: str, shape: Mapping[str, Any]) -> nn.Module:
    """Starts with attention that looks at near and similar patches, which saves most of the pre-training."""
    if provider == "open_clip":
        model, position, blocks = _open_clip_vit(shape)
        attentions = [(block.attn.in_proj_weight, block.attn.out_proj.weight) for block in blocks]
    elif provider == "timm":
        model, position, blocks = _timm_vit(shape)
        attentions = [(block.attn.qkv.weight, block.attn.proj.weight) for block in blocks]
    else:
        raise ConfigError(f"provider {provider!r} has no tiny ViT; there are: open_clip, timm.")
    grid_size = shape["image_size"] // shape["patch_size"]
    with torch.no_grad():
        num_patches = grid_size**2
        position.view(-1, shape["width"])[-num_patches:] = POSITION_SCALE * sin_cos_2d(
            grid_size, shape["width"]
        )
        for qkv, projection in attentions:
            mimetic_init(qkv, projection, shape["heads"])
    return model


def penultimate(model: Any, pixels_I3HW: Tensor) -> Tensor:
    """-> `[I, V, C]`: what the encoders of `morebench.models.vision` return, with gradients."""
    if hasattr(model, "transformer"):  # open_clip
        hidden = model._embeds(pixels_I3HW)
        for block in model.transformer.resblocks[:-1]:
            hidden = block(hidden)
        return hidden[:, 1:]
    index = len(model.blocks) - 2
    (features_IVC,) = model.forward_intermediates(
        pixels_I3HW, indices=[index], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    return features_IVC


def trained_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the blocks, the rest) of what `penultimate` runs."""
    blocks = model.transformer.resblocks if hasattr(model, "transformer") else model.blocks
    trained = [parameter for block in blocks[:-1] for parameter in block.parameters()]
    outside = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("transformer.resblocks.", "blocks.", "ln_post.", "proj", "norm.", "fc_norm."))
    ]
    matrices = [parameter for parameter in trained if parameter.ndim == 2]
    return matrices, [parameter for parameter in trained if parameter.ndim != 2] + outside


def sin_cos_2d(grid_size: int, width: int) -> Tensor:
    """`[V, C]`, row-major: a quarter of the channels each for sine and cosine of y and of x."""
    frequencies = 100 ** -torch.linspace(0, 1, width // 4 + 1)[:-1]
    steps = torch.arange(grid_size, dtype=torch.float32)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (y, x)]
    return torch.cat([wave(angle) for wave in (torch.sin, torch.cos) for angle in angles], dim=1)


def mimetic_init(qkv: Tensor, projection: Tensor, heads: int) -> None:
    """Query times key near the identity, value times projection near minus it (arXiv 2305.09828)."""
    width = len(projection)
    head_dim = width // heads
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        left, right = _factors(_near_identity(LOCALITY, width), head_dim)
        qkv[:width][rows] = left.T
        qkv[width : 2 * width][rows] = right
    left, right = _factors(_near_identity(-VALUE_SCALE, width), width)
    qkv[2 * width :] = right
    projection.copy_(left)


def _near_identity(scale: float, width: int) -> Tensor:
    return scale * torch.eye(width) + abs(scale) * torch.randn(width, width) / width**0.5


def _factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of `product` of that rank."""
    left, values, right = torch.linalg.svd(product)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _open_clip_vit(shape: Mapping[str, Any]) -> tuple[nn.Module, nn.Parameter, Any]:
    from open_clip.transformer import QuickGELU, VisionTransformer

    model = VisionTransformer(
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        width=shape["width"],
        layers=shape["blocks"],
        heads=shape["heads"],
        mlp_ratio=shape["mlp_dim"] / shape["width"],
        output_dim=shape["width"],
        act_layer={"quick_gelu": QuickGELU, "gelu": nn.GELU}[shape["activation"]],
        norm_layer=partial(nn.LayerNorm, eps=shape["norm_eps"]),
    )
    return model, model.positional_embedding, model.transformer.resblocks


def _timm_vit(shape: Mapping[str, Any]) -> tuple[nn.Module, nn.Parameter, Any]:
    from timm.layers.create_act import get_act_layer
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=shape["image_size"],
        patch_size=shape["patch_size"],
        embed_dim=shape["width"],
        depth=shape["blocks"],
        num_heads=shape["heads"],
        mlp_ratio=shape["mlp_dim"] / shape["width"],
        class_token=shape["prefix_tokens"] > 0,
        init_values=1.0 if shape.get("layer_scale") else None,
        act_layer=get_act_layer(shape["activation"]),
        norm_layer=partial(nn.LayerNorm, eps=shape["norm_eps"]),
        num_classes=0,
        global_pool="token" if shape["prefix_tokens"] else "avg",
    )
    assert model.pos_embed is not None
    return model, model.pos_embed, model.blocks
