"""Vision encoders as the classes of transformers, for `LlavaForConditionalGeneration`.

LLaVA chooses the hidden state it reads by `vision_feature_layer`. We build only the blocks below it, so a
tower has that many blocks and LLaVA reads the last hidden state, which comes before the final norm.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from morebench.errors import ConfigError, WeightsError, join_problems
from morebench.models.vision import OpenClipEncoder, PatchEncoder, TimmEncoder, TransformersEncoder

# The largest difference of a feature, as a share of the largest feature: fp32 sums in another order.
TOLERANCE = 1e-4
_UNREAD = ("post_layernorm.", "layernorm.")  # final norms: built by transformers, not read by LLaVA


@dataclass(frozen=True)
class Layout:
    """How a class of transformers names what a provider names otherwise.

    `names`: start of a key -> its counterpart; `{}` is the block's number. `joined`: the provider's one
    matrix for queries, keys and values, whose counterparts have q, k and v for `?`. `block`: start of the
    blocks' keys.
    """

    model_type: str
    names: Mapping[str, str]
    joined: str
    block: str


_CLIP = Layout(
    "clip_vision_model",
    {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.": "embeddings.patch_embedding.",
        "ln_pre.": "pre_layrnorm.",
        "transformer.resblocks.{}.ln_1.": "encoder.layers.{}.layer_norm1.",
        "transformer.resblocks.{}.attn.out_proj.": "encoder.layers.{}.self_attn.out_proj.",
        "transformer.resblocks.{}.ln_2.": "encoder.layers.{}.layer_norm2.",
        "transformer.resblocks.{}.mlp.c_fc.": "encoder.layers.{}.mlp.fc1.",
        "transformer.resblocks.{}.mlp.c_proj.": "encoder.layers.{}.mlp.fc2.",
        "transformer.resblocks.{}.attn.in_proj_": "encoder.layers.{}.self_attn.?_proj.",
    },
    joined="attn.in_proj_",
    block="transformer.resblocks.",
)
_SIGLIP = Layout(
    "siglip_vision_model",
    {
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj.": "embeddings.patch_embedding.",
        "blocks.{}.norm1.": "encoder.layers.{}.layer_norm1.",
        "blocks.{}.attn.proj.": "encoder.layers.{}.self_attn.out_proj.",
        "blocks.{}.norm2.": "encoder.layers.{}.layer_norm2.",
        "blocks.{}.mlp.": "encoder.layers.{}.mlp.",
        "blocks.{}.attn.qkv.": "encoder.layers.{}.self_attn.?_proj.",
    },
    joined="attn.qkv.",
    block="blocks.",
)
_DINOV2 = Layout(
    "dinov2",
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.{}.norm1.": "encoder.layer.{}.norm1.",
        "blocks.{}.attn.proj.": "encoder.layer.{}.attention.o_proj.",
        "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
        "blocks.{}.norm2.": "encoder.layer.{}.norm2.",
        "blocks.{}.mlp.": "encoder.layer.{}.mlp.",
        "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
        "blocks.{}.attn.qkv.": "encoder.layer.{}.attention.?_proj.",
    },
    joined="attn.qkv.",
    block="blocks.",
)


def select_strategy(num_prefix_tokens: int) -> Literal["default", "full"]:
    """LLaVA's `vision_feature_select_strategy`: `default` drops the first token, `full` none.

    Raises ConfigError for more prefix tokens: LLaVA would take the others for patches.
    """
    if num_prefix_tokens > 1:
        raise ConfigError(
            f"vision: the encoder has {num_prefix_tokens} prefix tokens (class and registers). "
            "LlavaForConditionalGeneration drops one or none, and would hand the registers to the LLM. "
            "Choose an encoder without registers, e.g. vision=dinov2."
        )
    return "default" if num_prefix_tokens else "full"


@torch.no_grad()
def as_transformers(encoder: PatchEncoder, shape: Mapping[str, Any]) -> PreTrainedModel:
    """The encoder as a vision tower of LLaVA, its weights in fp32.

    Raises ConfigError for an encoder without a counterpart, WeightsError if the features differ from ours.
    """
    state: dict[str, Tensor] = encoder.get_submodule("model").state_dict()
    if isinstance(encoder, TransformersEncoder):
        config = copy.deepcopy(encoder.model.config)
    else:
        layout = _layout_of(encoder, shape)
        config = _config(layout, shape, _num_blocks(state, layout))
        state = _renamed(state, layout)
    tower = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    found = tower.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=False)
    missing = [key for key in found.missing_keys if not key.startswith(_UNREAD)]
    if missing or found.unexpected_keys:
        problems = [f"{key}: the encoder lacks it" for key in sorted(missing)]
        problems += [f"{key}: {config.model_type} has no place for it" for key in found.unexpected_keys]
        raise ConfigError(join_problems([_no_counterpart(encoder, config.model_type), *problems]))
    _compare(encoder, tower)
    return tower


def _num_blocks(state: Mapping[str, Tensor], layout: Layout) -> int:
    return 1 + max(
        int(key.removeprefix(layout.block).partition(".")[0]) for key in state if key.startswith(layout.block)
    )


def _layout_of(encoder: PatchEncoder, shape: Mapping[str, Any]) -> Layout:
    if isinstance(encoder, OpenClipEncoder):
        return _CLIP
    if isinstance(encoder, TimmEncoder) and encoder.num_prefix_tokens == 0 and not shape.get("layer_scale"):
        return _SIGLIP
    if isinstance(encoder, TimmEncoder) and encoder.num_prefix_tokens == 1 and shape.get("layer_scale"):
        return _DINOV2
    raise ConfigError(_no_counterpart(encoder, "each vision model that LLaVA takes"))


def _no_counterpart(encoder: nn.Module, model_type: str) -> str:
    return (
        f"vision: {type(encoder).__name__} differs from {model_type}. There are counterparts for open_clip's "
        "CLIP, timm's SigLIP (no class token, no layer scale) and DINOv2 (class token, layer scale, no "
        "registers), and transformers' own models."
    )


def _config(layout: Layout, shape: Mapping[str, Any], blocks: int) -> Any:
    activation = shape["activation"]
    common = {
        "image_size": shape["image_size"],  # the position grid is that of the input, so nothing is resampled
        "patch_size": shape["patch_size"],
        "hidden_size": shape["width"],
        "num_hidden_layers": blocks,
        "num_attention_heads": shape["heads"],
        "hidden_act": "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation,
        "layer_norm_eps": shape["norm_eps"],
    }
    if layout is not _DINOV2:
        # SigLIP's pooling head is not built; CLIP has no such field
        own = {"vision_use_head": False} if layout is _SIGLIP else {}
        return AutoConfig.for_model(layout.model_type, **common, intermediate_size=shape["mlp_dim"], **own)
    ratio, rest = divmod(shape["mlp_dim"], shape["width"])
    if rest:
        raise ConfigError(
            f"vision: mlp_dim {shape['mlp_dim']} is no multiple of the width {shape['width']}, which "
            "Dinov2Config.mlp_ratio must state."
        )
    return AutoConfig.for_model(layout.model_type, **common, mlp_ratio=ratio, use_mask_token=False)


def _renamed(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A key without a counterpart keeps its name, so that loading reports it."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for old, new in layout.names.items():
            number = key.removeprefix(layout.block).partition(".")[0]
            old, new = old.replace("{}", number), new.replace("{}", number)
            if not key.startswith(old):
                continue
            name = new + key.removeprefix(old)
            if layout.joined in key:
                renamed |= {
                    name.replace("?", x): part for x, part in zip("qkv", tensor.chunk(3), strict=True)
                }
            else:
                renamed[name] = tensor
            break
        else:
            renamed[key] = tensor
    position = "embeddings.position_embedding.weight"
    if position in renamed:
        renamed[position] = renamed[position].flatten(end_dim=-2)  # timm's has a batch axis
    return renamed


def _compare(encoder: PatchEncoder, tower: PreTrainedModel) -> None:
    """On noise: a timm variant may compute something else from the same tensors."""
    pixels_I3HW = torch.randn(
        1, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0)
    )
    ours_IVC = copy.deepcopy(encoder).float().cpu().eval()(pixels_I3HW)
    hidden = tower(pixel_values=pixels_I3HW, output_hidden_states=True).hidden_states[-1]
    theirs_IVC = hidden[:, encoder.num_prefix_tokens :]
    difference = float((ours_IVC - theirs_IVC).abs().max() / ours_IVC.abs().max())
    if not difference <= TOLERANCE:
        raise WeightsError(
            f"vision: the features of {type(tower).__name__} differ from {type(encoder).__name__}'s by "
            f"{difference:.1e} of the largest; rounding gives at most {TOLERANCE:.0e}. Its shape and "
            "timm's or open_clip's model do not compute the same."
        )
