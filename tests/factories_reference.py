"""Tiny checkpoints in the published layout of LLaVA-1.5 and LLaVA-MORE, and their models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from factories_vision import normalise_of, stock_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from morebench.config.compose import load_shape
from morebench.digits.tiny_tokenizer import FAMILIES, train_tokenizer
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.projector import MLPProjector
from morebench.models.vision import TransformersEncoder

MODEL_TYPES = {"llama_tiny": "llava_llama", "phi_tiny": "llava_phi", "gemma2_tiny": "llava_gemma"}
TOWER_TYPES = {
    "clip_tiny": "clip_vision_model",
    "siglip_tiny": "siglip_vision_model",
    "dinov2_tiny": "dinov2",
}
TOWER = "model.vision_tower.vision_tower."


class Published:
    """`tensors` and `config` of a checkpoint, before they are written."""

    def __init__(self, llm: str, vision: str, num_scales: int = 1) -> None:
        torch.manual_seed(3)
        self.shape, self.vision_shape = load_shape(f"llm/{llm}.json"), load_shape(f"vision/{vision}.json")
        self.vision = vision
        self.tokenizer = make_tokenizer(llm)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(self.tokenizer, name) for name in names}
        self.llm: PreTrainedModel = AutoModelForCausalLM.from_config(
            llm_config(self.shape | ids), dtype=torch.float32, attn_implementation=VARLEN
        )
        self.tower = stock_model(TOWER_TYPES[vision], self.vision_shape)
        width = self.vision_shape["width"] * num_scales
        self.projector = MLPProjector(width, self.shape["hidden_size"], depth=2)
        self.visual_scale = self.shape["hidden_size"] ** 0.5 if llm == "gemma2_tiny" else 1.0
        self.tensors = self._tensors()
        self.config: dict[str, Any] = {
            **self.shape,
            **ids,
            "model_type": MODEL_TYPES[llm],
            "architectures": ["LlavaForCausalLM"],
            "transformers_version": "4.43.1",
            "torch_dtype": "float32",
            "use_cache": True,
            "mm_vision_tower": "/somebody/s/disk/tower",
            "mm_hidden_size": width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_projector_lr": None,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 512,
            "s2": False,
            "s2_scales": "336,672,1008",
            "siglip": vision == "siglip_tiny",
            "model_architecture": "llama_3_1",
        }

    def _tensors(self) -> dict[str, Tensor]:
        llm = dict(self.llm.state_dict())
        if self.shape["tie_word_embeddings"]:
            del llm["lm_head.weight"]
        # published towers of CLIP and SigLIP have the prefix that transformers 5 dropped
        prefix = "" if self.vision == "dinov2_tiny" else "vision_model."
        tower = {f"{TOWER}{prefix}{name}": value for name, value in self.tower.state_dict().items()}
        return {**llm, **self.projector_tensors(), **tower}

    def projector_tensors(self) -> dict[str, Tensor]:
        return {f"model.mm_projector.{name}": value for name, value in self.projector.state_dict().items()}

    def write(self, folder: Path, num_shards: int = 1, suffix: str = "safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        names = sorted(self.tensors)
        if num_shards == 1:
            write_tensors(self.tensors, folder / f"{stem}.{suffix}")
        else:
            place = {
                name: f"{stem}-{i % num_shards + 1:05}-of-{num_shards:05}.{suffix}"
                for i, name in enumerate(names)
            }
            for file in set(place.values()):
                write_tensors(
                    {name: self.tensors[name] for name in names if place[name] == file}, folder / file
                )
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": place}))
        (folder / "config.json").write_text(json.dumps(self.config))
        self.tokenizer.save_pretrained(folder)
        return folder

    def write_projector(self, folder: Path, suffix: str = "bin") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.projector_tensors(), folder / f"mm_projector.{suffix}")
        stage_1 = {"image_aspect_ratio": "square", "tune_mm_mlp_adapter": True}
        (folder / "config.json").write_text(json.dumps(self.config | stage_1))
        return folder

    def mllm(self, folder: Path) -> MLLM:
        """The model that the checkpoint was made from; its tower goes through `folder`."""
        self.tower.save_pretrained(folder)
        encoder = TransformersEncoder(
            self.vision_shape, folder, feature_layer=-2, name=TOWER_TYPES[self.vision]
        )
        mllm = MLLM(normalise_of(self.vision), encoder, self.projector, self.llm, self.visual_scale)
        return mllm.eval().requires_grad_(False)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(content, path)


def make_tokenizer(llm: str) -> PreTrainedTokenizerFast:
    family = {"llama_tiny": "llama", "phi_tiny": "phi", "gemma2_tiny": "gemma2"}[llm]
    return train_tokenizer(FAMILIES[family], ["red seven top left", "Where is the green nine?"], 512)
