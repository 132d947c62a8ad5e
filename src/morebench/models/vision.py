"""Vision encoders: pixels to one feature per patch, out of the hidden state that `feature_layer` names.

Later blocks, the final norm and the pooling head are not built. Prefix tokens (class, registers) take part
in attention and are dropped from the output.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from morebench.config.visual import built_blocks
from morebench.errors import ConfigError
from morebench.models.vision_names import check_facts, check_timm_name, open_clip_facts, unknown
from morebench.models.vision_weights import OPEN_CLIP, TIMM, PositionGrid, load_encoder, load_pretrained


class VisionEncoder(Protocol):
    image_size: int  # pixels
    num_visual_tokens: int
    feature_dim: int

    def __call__(self, pixels_I3HW: Tensor) -> Tensor:
        """-> `[I, V, C]`, row-major over the patch grid."""
        ...


class PatchEncoder(nn.Module):
    """What the three providers share: sizes read off the shape, patches cut out of the hidden state."""

    def __init__(self, shape: Mapping[str, Any], feature_layer: int) -> None:
        super().__init__()
        self.image_size: int = shape["image_size"]
        self.grid_size: int = shape["image_size"] // shape["patch_size"]
        self.num_visual_tokens: int = self.grid_size**2
        self.feature_dim: int = shape["width"]
        self.num_prefix_tokens: int = shape["prefix_tokens"]
        self.num_blocks = built_blocks(shape["blocks"], feature_layer)

    def hidden_state(self, pixels_I3HW: Tensor) -> Tensor:
        """-> `[I, T, C]`: the output of the last built block, prefix tokens first."""
        raise NotImplementedError

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        hidden_ITC = self.hidden_state(pixels_I3HW)
        expected = self.num_prefix_tokens + self.num_visual_tokens
        if hidden_ITC.shape[1] != expected:
            raise ConfigError(
                f"vision.shape says {self.num_prefix_tokens} prefix tokens + {self.grid_size} x "
                f"{self.grid_size} patches = {expected}, the encoder has {hidden_ITC.shape[1]} tokens."
            )
        return hidden_ITC[:, self.num_prefix_tokens :]


class OpenClipEncoder(PatchEncoder):
    """An open_clip image tower. `name` is the open_clip model whose facts the shape must repeat, or None."""

    def __init__(
        self, shape: Mapping[str, Any], weights: Path | None, *, feature_layer: int, name: str | None = None
    ) -> None:
        from open_clip.transformer import QuickGELU, VisionTransformer

        super().__init__(shape, feature_layer)
        if name is not None:
            check_facts(name, shape, open_clip_facts(name))
        activations = {
            "quick_gelu": QuickGELU,
            "gelu": nn.GELU,
            "gelu_tanh": partial(nn.GELU, approximate="tanh"),
        }
        self.model = VisionTransformer(
            image_size=shape["image_size"],
            patch_size=shape["patch_size"],
            width=shape["width"],
            layers=self.num_blocks,
            heads=shape["heads"],
            mlp_ratio=shape["mlp_dim"] / shape["width"],
            act_layer=activations[shape["activation"]],
            norm_layer=partial(nn.LayerNorm, eps=shape["norm_eps"]),
        )
        del self.model.ln_post, self.model.proj
        if weights is not None:
            load_encoder(self.model, weights, OPEN_CLIP, shape["blocks"])

    def hidden_state(self, pixels_I3HW: Tensor) -> Tensor:
        return self.model.transformer(self.model._embeds(pixels_I3HW))


class TimmEncoder(PatchEncoder):
    """A timm ViT. `name` None: a plain ViT of the shape; else that model's variant of it."""

    def __init__(
        self, shape: Mapping[str, Any], weights: Path | None, *, feature_layer: int, name: str | None = None
    ) -> None:
        from timm import create_model
        from timm.layers.create_act import get_act_layer
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(shape, feature_layer)
        if name is not None:
            check_timm_name(name)
        num_registers = max(self.num_prefix_tokens - 1, 0)
        build = VisionTransformer if name is None else partial(create_model, name)
        self.model: Any = build(
            img_size=shape["image_size"],
            patch_size=shape["patch_size"],
            embed_dim=shape["width"],
            depth=self.num_blocks,
            num_heads=shape["heads"],
            mlp_ratio=shape["mlp_dim"] / shape["width"],
            class_token=self.num_prefix_tokens > 0,
            reg_tokens=num_registers,
            no_embed_class=num_registers > 0,  # registers have no position
            init_values=1e-5 if shape.get("layer_scale") else None,
            # timm's SigLIP defaults to exact GELU where the published configuration says tanh
            act_layer=get_act_layer(shape["activation"]),
            norm_layer=partial(nn.LayerNorm, eps=shape["norm_eps"]),
            num_classes=0,
            global_pool="",
        )
        self.model.norm = nn.Identity()
        if weights is not None:
            prefix_positions = 0 if num_registers else self.num_prefix_tokens
            grid = _position_grid(shape, prefix_positions)
            load_encoder(self.model, weights, TIMM, shape["blocks"], grid)

    def hidden_state(self, pixels_I3HW: Tensor) -> Tensor:
        return self.model.forward_features(pixels_I3HW)


class TransformersEncoder(PatchEncoder):
    """A transformers vision model; `name` is its `model_type`, e.g. `siglip_vision_model` or `dinov2`."""

    def __init__(
        self, shape: Mapping[str, Any], weights: Path | None, *, feature_layer: int, name: str
    ) -> None:
        super().__init__(shape, feature_layer)
        config = _transformers_config(name, shape, self.num_blocks)
        with torch.device("meta"):
            blocks, after = _find_blocks(_random(config), self.num_blocks, name)
        if weights is None:
            self.model = _random(config)
        else:
            self.model = load_pretrained(config, weights, blocks, shape["blocks"], after)
        for module in after:
            setattr(self.model, module, nn.Identity())

    def hidden_state(self, pixels_I3HW: Tensor) -> Tensor:
        return self.model(pixel_values=pixels_I3HW).last_hidden_state


def _transformers_config(name: str, shape: Mapping[str, Any], num_blocks: int) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if name not in CONFIG_MAPPING or name not in MODEL_MAPPING_NAMES:
        raise ConfigError(unknown(name, MODEL_MAPPING_NAMES, "transformers has no model_type"))
    activation = shape["activation"]
    fields = {
        # DINOv2 keeps its pre-training grid and resamples it in every forward
        "image_size": shape.get("pretrain_image_size", shape["image_size"]),
        "patch_size": shape["patch_size"],
        "hidden_size": shape["width"],
        "num_hidden_layers": num_blocks,
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["mlp_dim"],
        "mlp_ratio": shape["mlp_dim"] // shape["width"],
        "hidden_act": "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation,
        "layer_norm_eps": shape["norm_eps"],
        "num_register_tokens": max(shape["prefix_tokens"] - 1, 0),
        "vision_use_head": False,
    }
    try:
        return AutoConfig.for_model(name, **fields)
    except Exception as error:  # each of some hundred classes validates in its own way
        raise _no_plain_vit(name, str(error)) from error


def _random(config: Any) -> Any:
    from transformers import AutoModel

    try:
        return AutoModel.from_config(config)
    except Exception as error:  # as above
        raise _no_plain_vit(config.model_type, str(error)) from error


def _no_plain_vit(name: str, reason: str) -> ConfigError:
    return ConfigError(f"transformers' {name} is no plain ViT that vision.shape describes: {reason}")


def _find_blocks(model: nn.Module, num_blocks: int, name: str) -> tuple[str, tuple[str, ...]]:
    """(module that holds the blocks, modules that follow it: final norm, pooler, head)."""
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if len(lists) != 1:
        raise _no_plain_vit(name, f"expected one list of {num_blocks} blocks, found {len(lists)}.")
    children = [child for child, _ in model.named_children()]
    return lists[0], tuple(children[children.index(lists[0].split(".")[0]) + 1 :])


def _position_grid(shape: Mapping[str, Any], num_prefix_tokens: int) -> PositionGrid | None:
    if "pretrain_image_size" not in shape:
        return None
    size = shape["pretrain_image_size"] // shape["patch_size"]
    return PositionGrid(size, num_prefix_tokens, shape["position_antialias"])
