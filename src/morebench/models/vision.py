"""Vision encoders: pixels to one feature per patch, out of the block before the last.

The last block, the final norm and the pooling head are not built. Prefix tokens (class, registers) take part
in attention and are dropped from the output.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate

from morebench.errors import WeightsError, join_problems


class VisionEncoder(Protocol):
    image_size: int  # pixels
    num_visual_tokens: int
    feature_dim: int

    def __call__(self, pixels_I3HW: Tensor) -> Tensor:
        """-> `[I, V, C]`, row-major over the patch grid."""
        ...


class PatchEncoder(nn.Module):
    """What the three providers share: sizes read off the shape, weights out of a folder."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.image_size: int = shape["image_size"]
        self.grid_size: int = shape["image_size"] // shape["patch_size"]
        self.num_visual_tokens: int = self.grid_size**2
        self.feature_dim: int = shape["width"]
        self.num_prefix_tokens: int = shape["prefix_tokens"]


class OpenClipEncoder(PatchEncoder):
    """An open_clip image tower. `name` is the open_clip model whose facts the shape must repeat, or None."""

    def __init__(self, shape: Mapping[str, Any], weights: Path | None, name: str | None = None) -> None:
        from open_clip.transformer import QuickGELU, VisionTransformer

        super().__init__(shape)
        if name is not None:
            _check_facts(name, shape, _open_clip_facts(name))
        self.model = VisionTransformer(
            image_size=shape["image_size"],
            patch_size=shape["patch_size"],
            width=shape["width"],
            layers=shape["blocks"] - 1,
            heads=shape["heads"],
            mlp_ratio=shape["mlp_dim"] / shape["width"],
            act_layer={"quick_gelu": QuickGELU, "gelu": nn.GELU}[shape["activation"]],
            norm_layer=partial(nn.LayerNorm, eps=shape["norm_eps"]),
        )
        del self.model.ln_post, self.model.proj
        if weights is not None:
            load_encoder(self.model, weights)

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        hidden = self.model.transformer(self.model._embeds(pixels_I3HW))
        return hidden[:, self.num_prefix_tokens :]


class TimmEncoder(PatchEncoder):
    """A timm ViT. `name` None: a plain ViT of the shape; else that model's variant of it."""

    def __init__(self, shape: Mapping[str, Any], weights: Path | None, name: str | None = None) -> None:
        from timm import create_model
        from timm.layers.create_act import get_act_layer
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(shape)
        num_registers = max(self.num_prefix_tokens - 1, 0)
        build = VisionTransformer if name is None else partial(create_model, name)
        self.model: Any = build(
            img_size=shape["image_size"],
            patch_size=shape["patch_size"],
            embed_dim=shape["width"],
            depth=shape["blocks"] - 1,
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
            load_encoder(
                self.model,
                weights,
                position_key="pos_embed",
                num_prefix_tokens=0 if num_registers else self.num_prefix_tokens,
                antialias=shape.get("position_antialias", False),
            )

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        return self.model.forward_features(pixels_I3HW)[:, self.num_prefix_tokens :]


class TransformersEncoder(PatchEncoder):
    """A transformers vision model; `name` is its `model_type`, e.g. `siglip_vision_model` or `dinov2`."""

    def __init__(self, shape: Mapping[str, Any], weights: Path | None, name: str) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__(shape)
        activation = shape["activation"]
        config = AutoConfig.for_model(
            name,
            # DINOv2 keeps its pre-training grid and resamples it in every forward
            image_size=shape.get("pretrain_image_size", shape["image_size"]),
            patch_size=shape["patch_size"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["blocks"] - 1,
            num_attention_heads=shape["heads"],
            intermediate_size=shape["mlp_dim"],
            mlp_ratio=shape["mlp_dim"] // shape["width"],
            hidden_act="gelu_pytorch_tanh" if activation == "gelu_tanh" else activation,
            layer_norm_eps=shape["norm_eps"],
            num_register_tokens=max(self.num_prefix_tokens - 1, 0),
            vision_use_head=False,
        )
        self.model = AutoModel.from_config(config) if weights is None else _from_pretrained(config, weights)
        for final_norm in ("post_layernorm", "layernorm"):
            if hasattr(self.model, final_norm):
                setattr(self.model, final_norm, nn.Identity())

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        return self.model(pixel_values=pixels_I3HW).last_hidden_state[:, self.num_prefix_tokens :]


def _from_pretrained(config: Any, folder: Path) -> Any:
    """transformers itself reads its checkpoints: it renames the keys of older ones."""
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"The weights in {folder} do not fit the shape: {error}") from error
    if report["missing_keys"]:
        missing = [f"{key}: missing" for key in sorted(report["missing_keys"])]
        raise WeightsError(join_problems([f"The weights in {folder} do not fit the shape:", *missing]))
    return model


def load_encoder(
    model: nn.Module,
    folder: Path,
    position_key: str | None = None,
    num_prefix_tokens: int = 0,
    antialias: bool = False,
) -> None:
    """Fill `model` from the folder's safetensors; tensors of parts that are not built are left out.

    The file may hold a larger model: the keys are looked for below whatever prefix they have there. A
    position grid (`position_key`) of another size is resampled as transformers does. Raises one WeightsError
    for all missing or misfitting tensors.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update({key: path for key in file.keys() if key not in files})  # noqa: SIM118
    wanted = model.state_dict()
    anchor = max(wanted, key=len)
    prefixes = [key.removesuffix(anchor) for key in files if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        raise WeightsError(
            f"{folder} has no tensor {anchor} in {sorted({path.name for path in files.values()})}, so it is "
            f"no checkpoint for {type(model).__name__}. Is vision.encoder the right class for these weights?"
        )
    prefix = min(prefixes, key=len)
    state, problems = {}, []
    for key, parameter in wanted.items():
        if prefix + key not in files:
            problems.append(f"{prefix}{key}: missing")
            continue
        with safe_open(files[prefix + key], "pt") as file:
            tensor = file.get_tensor(prefix + key)
        if key == position_key and tensor.shape != parameter.shape:
            tensor = _resample(tensor, parameter.shape[1], num_prefix_tokens, antialias)
        if tensor.shape != parameter.shape:
            problems.append(f"{prefix}{key}: shape {list(tensor.shape)}, expected {list(parameter.shape)}")
        state[key] = tensor
    if problems:
        raise WeightsError(join_problems([f"The weights in {folder} do not fit the shape:", *problems]))
    model.load_state_dict(state)


def _resample(grid_1PC: Tensor, num_positions: int, num_prefix_tokens: int, antialias: bool) -> Tensor:
    prefix, patches = grid_1PC[:, :num_prefix_tokens], grid_1PC[:, num_prefix_tokens:]
    old, new = int(patches.shape[1] ** 0.5), int((num_positions - num_prefix_tokens) ** 0.5)
    map_1CHW = patches.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resampled = interpolate(map_1CHW, size=(new, new), mode="bicubic", antialias=antialias)
    return torch.cat([prefix, resampled.flatten(2).mT.to(prefix.dtype)], dim=1)


def _open_clip_facts(name: str) -> dict[str, Any]:
    from open_clip import get_model_config

    model = get_model_config(name)
    if model is None:
        raise WeightsError(f"open_clip knows no model {name!r}.")
    vision = model["vision_cfg"]
    return {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["width"],
        "blocks": vision["layers"],
        "heads": vision["width"] // vision.get("head_width", 64),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def _check_facts(name: str, shape: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: {name} has {facts[key]}, the shape says {shape[key]}"
        for key in facts
        if facts[key] != shape[key]
    ]
    if problems:
        raise WeightsError(join_problems(problems))
