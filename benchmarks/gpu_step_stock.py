"""The plain transformers step: Llava, padded, logits at every position, every block recomputed, as LLaVA's
training scripts do; bf16 autocast, and fp32 copies of what is trained."""

import time
from typing import Any

import numpy as np
import torch
from gpu_step_batches import Drawn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from morebench.config.compose import load_shape
from morebench.config.schema import Config, Part, TrainRecipe
from morebench.models.llm import llm_config


def run_stock(
    config: Config,
    recipe: TrainRecipe,
    samples: list[Drawn],
    size: int,
    warm: int,
    steps: int,
    device: torch.device,
) -> float:
    """Seconds of an optimizer step over all samples, `size` at a time. Raises torch.OutOfMemoryError."""
    model = _model(config, recipe, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr, fused=True)
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    batches = [_padded(group, model.config.image_token_index) for group in groups]
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    began = 0.0
    for number in range(warm + steps):
        if number == warm:
            _synchronise(device)
            began = time.perf_counter()
        for batch in batches:
            moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if "pixel_values" in moved:
                moved["pixel_values"] = moved["pixel_values"].permute(0, 3, 1, 2).bfloat16() / 127.5 - 1
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**moved, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _synchronise(device)
    return (time.perf_counter() - began) / steps


def _model(config: Config, recipe: TrainRecipe, device: torch.device) -> LlavaForConditionalGeneration:
    text = llm_config(load_shape(config.llm.shape))
    # transformers refuses sdpa for Gemma-2, which it would compute without the soft-cap
    text._attn_implementation = "eager" if text.model_type == "gemma2" else "sdpa"
    llava = LlavaConfig(
        vision_config=_vision(load_shape(config.vision.shape)),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        vision_feature_layer=config.vision.feature_layer,
        vision_feature_select_strategy="default" if _has_class_token(config) else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if Part.llm in recipe.trainable else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(llava)
    finally:
        torch.set_default_dtype(former)
    model.requires_grad_(False)
    model.model.vision_tower.to(torch.bfloat16)
    trained: list[nn.Module] = [model.model.multi_modal_projector.float()]
    if Part.llm in recipe.trainable:
        trained += [model.model.language_model, model.lm_head]
    for module in trained:
        module.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _has_class_token(config: Config) -> bool:
    return load_shape(config.vision.shape)["prefix_tokens"] > 0


def _vision(shape: dict[str, Any]) -> Any:
    fields = {
        "image_size": shape["image_size"],
        "patch_size": shape["patch_size"],
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["blocks"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["mlp_dim"],
    }
    kind = "clip_vision_model" if shape["prefix_tokens"] else "siglip_vision_model"
    return AutoConfig.for_model(kind, **fields)


def _padded(samples: list[Drawn], image_token_id: int) -> dict[str, Tensor]:
    ids, labels = [], []
    for sample in samples:
        encoded = sample.encoded
        ids.append(torch.from_numpy(np.where(encoded.visual_mask, image_token_id, encoded.input_ids)).long())
        labels.append(torch.from_numpy(np.where(encoded.supervised, encoded.input_ids, -100)).long())
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    if pixels := [torch.from_numpy(image) for sample in samples for image in sample.pixels]:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
