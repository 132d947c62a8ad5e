"""Tiny shapes and batches for the model tests."""

from collections.abc import Sequence
from typing import Any

import torch
from factories_vision import normalise_of, random_pixels
from torch import Tensor
from transformers import AutoModelForCausalLM

from morebench.data.batch import Batch
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.projector import MLPProjector
from morebench.models.vision import OpenClipEncoder

WIDTH, VOCABULARY = 32, 50

_COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLM_SHAPES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 5,  # shorter than every sample below
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "phi3_windowed": {"model_type": "phi3", "sliding_window": 5},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    # frequencies in all three bands: kept, blended, divided
    "llama31": {
        "model_type": "llama",
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "phi4": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [1.0, 4.0, 9.0],
        },
        "tie_word_embeddings": True,
    },
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
}
for _shape in LLM_SHAPES.values():
    _shape.update(_COMMON)

CLIP_SHAPE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "width": 32,
    "blocks": 3,
    "heads": 2,
    "mlp_dim": 64,
    "prefix_tokens": 1,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
}
NUM_VISUAL_TOKENS = 4


def tiny_mllm(family: str) -> MLLM:
    """fp32, the vision encoder frozen; weights large enough that soft-caps bend and attention is sharp."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(llm_config(LLM_SHAPES[family]), attn_implementation=VARLEN)
    for parameter in llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    projector = MLPProjector(CLIP_SHAPE["width"], WIDTH, depth=2)
    projector.initialise(seed=0)
    mllm = MLLM(
        normalise_of("clip_tiny"),
        OpenClipEncoder(CLIP_SHAPE, None, feature_layer=-2),
        projector,
        llm,
        WIDTH**0.5 if family == "gemma2" else 1.0,
    )
    mllm.get_submodule("vision").requires_grad_(False)
    return mllm.train()


def packed(lengths: Sequence[int], with_image: Sequence[bool], seed: int = 0) -> Batch:
    """Samples with an image after their first token; every token of the last half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator)
    visual = [
        start + 1 + v
        for start, has_image in zip(starts, with_image, strict=True)
        if has_image
        for v in range(NUM_VISUAL_TOKENS)
    ]
    targets = [
        position
        for start, length in zip(starts, lengths, strict=True)
        for position in range(start + length // 2, start + length - 1)
    ]
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        visual_positions=torch.tensor(visual, dtype=torch.int64),
        pixel_values=random_pixels(sum(with_image), 16, generator),
        features=torch.zeros(0, 0, 0),
        feature_scales=torch.zeros(0, 0, 0),
        target_positions=torch.tensor(targets),
        targets=ids[torch.tensor(targets) + 1],
        num_supervised=torch.tensor(len(targets)),
        sample_ids=torch.arange(len(lengths)),
    )


def gradients(mllm: MLLM) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in mllm.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
