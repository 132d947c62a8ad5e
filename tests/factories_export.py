"""Finished finetune runs of tiny cells on disk, with random weights that differ from the starting ones."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from factories_data import tokenizer_for
from factories_models import LLM_SHAPES
from factories_training import make_cell
from safetensors.torch import save_file
from test_vision import CLIP, DINOV2, SIGLIP
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from morebench.config.compose import save_config
from morebench.config.schema import (
    LLM,
    Config,
    ImageProcessing,
    Interpolation,
    Part,
    Precision,
    Resize,
    Vision,
    VisualScale,
    Weights,
)
from morebench.models.llm import llm_config
from morebench.models.parts import build_mllm, save_parts
from morebench.models.vision import OpenClipEncoder, PatchEncoder, TimmEncoder
from morebench.models.weights import starting_weights

CHAT_FORMATS = {"gemma2": "gemma_2", "llama": "llama_3_1", "phi3": "phi_4", "phi": "phi_2"}
PAD_TOKENS = {
    "gemma2": "<pad>",
    "llama": "<|finetune_right_pad_id|>",
    "phi3": "<|endoftext|>",
    "phi": "<|endoftext|>",
}
ENCODERS: dict[str, tuple[type[PatchEncoder], dict[str, Any], Resize, int, Interpolation]] = {
    "clip": (OpenClipEncoder, CLIP, Resize.shortest_edge, 24, Interpolation.bicubic),
    "siglip": (TimmEncoder, SIGLIP, Resize.squash, 28, Interpolation.bilinear),
    "dinov2": (TimmEncoder, DINOV2, Resize.shortest_edge, 28, Interpolation.bicubic),
}
# Gemma-2's window (5) is shorter than the image (9 tokens); one family has rows that no token uses.
PADDING_ROWS = {"gemma2": 3, "llama": 0, "phi3": 0, "phi": 0}


@dataclass(frozen=True)
class FinishedRun:
    config: Config
    folder: Path


def finished_run(
    root: Path, family: str, encoder: str, precision: Precision = Precision.fp32, **changes: Any
) -> FinishedRun:
    """`changes` are of the config's top level."""
    config = make_cell(root)
    torch.manual_seed(3)
    evaluate = replace(config.stage.evaluate, precision=precision)
    config = replace(
        config,
        llm=_llm(root / "llm", family),
        vision=_vision(root / "vision", encoder),
        stage=replace(config.stage, evaluate=evaluate),
    )
    mllm = build_mllm(config, dict(starting_weights(config)), Precision.fp32)
    for parameter in [*mllm.projector.parameters(), *mllm.llm.parameters()]:
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    folder = root / "runs" / f"{family}-{encoder}.finetune.0123"
    folder.mkdir(parents=True)
    save_parts(mllm, [Part.projector, Part.llm], folder)
    config = replace(config, **changes)
    save_config(config, folder / "config.yaml")
    (folder / "manifest.json").write_text(json.dumps({"step": "finetune"}))
    return FinishedRun(config, folder)


def _llm(folder: Path, family: str) -> LLM:
    tokenizer: PreTrainedTokenizerFast = tokenizer_for(CHAT_FORMATS[family])
    shape = LLM_SHAPES[family] | {
        "vocab_size": len(tokenizer) + PADDING_ROWS[family],
        "max_position_embeddings": 512,
    }
    AutoModelForCausalLM.from_config(llm_config(shape), dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LLM(
        label=family,
        size_group="Tiny",
        weights=Weights(folder=str(folder), hub_id=None, revision=None, build=None),
        shape=shape,
        chat_format=CHAT_FORMATS[family],
        pad_token=PAD_TOKENS[family],
        visual_scale=VisualScale.sqrt_hidden if family == "gemma2" else VisualScale.one,
    )


def _vision(folder: Path, name: str) -> Vision:
    encoder_class, shape, resize, resize_to, interpolation = ENCODERS[name]
    whole: Any = encoder_class(shape, None, feature_layer=-1)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in whole.model.state_dict().items()}, folder / "v.safetensors"
    )
    return Vision(
        label=name,
        weights=Weights(folder=str(folder), hub_id=None, revision=None, build=None),
        shape=dict(shape),
        feature_layer=-2,
        encoder={"_target_": f"morebench.models.vision.{encoder_class.__name__}", "name": None},
        image=ImageProcessing(
            resize=resize,
            resize_to=resize_to,
            interpolation=interpolation,
            mean=[0.5, 0.4, 0.3],
            std=[0.2, 0.3, 0.4],
        ),
    )
