"""What the estimate says a step keeps, against what autograd keeps."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories_models import CLIP_SHAPE, LLM_SHAPES, packed
from torch import Tensor, nn

from morebench.config.compose import compose_config
from morebench.config.schema import Attention, Config, Part, Precision, Strategy
from morebench.models.flops import sizes
from morebench.models.memory import is_counted, memory, state_per_rank
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm

STAGES = {"pretrain": [Part.projector], "finetune": [Part.projector, Part.llm]}
FAMILIES = {family: shape for family, shape in LLM_SHAPES.items() if family != "phi3_windowed"}
FAMILIES["gemma2"] = FAMILIES["gemma2"] | {"sliding_window": 4096}
FAMILIES["qwen2"] = FAMILIES["llama"] | {"model_type": "qwen2"}
FAMILIES["mistral"] = FAMILIES["llama"] | {"model_type": "mistral", "sliding_window": None}
FAMILIES["olmo2"] = FAMILIES["llama"] | {"model_type": "olmo2"}
WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 300, "tie_word_embeddings": False}
LENGTH = 40


def config_of(shape: dict[str, Any]) -> Config:
    config = compose_config(["llm=llama_tiny", "vision=clip_tiny"]).config
    vision = replace(config.vision, shape=CLIP_SHAPE)
    return replace(config, llm=replace(config.llm, shape=shape), vision=vision)


def wide(family: str) -> dict[str, Any]:
    shape = FAMILIES[family] | WIDE
    if family == "phi":  # every head has its own keys, and no head_dim of its own
        shape = shape | {"num_key_value_heads": 8}
    return {key: value for key, value in shape.items() if family not in ("phi", "qwen2") or key != "head_dim"}


def kept_bytes(mllm: MLLM, length: int) -> int:
    """Storages that the backward pass waits for, but for the weights and their bf16 copies."""
    batch = packed((length,), (True,))
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*mllm.parameters(), *mllm.buffers()]}
    shapes = {tuple(sorted(parameter.shape)) for parameter in mllm.parameters() if parameter.dim() == 2}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tuple(sorted(tensor.shape)) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        mllm(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_keeps_what_is_estimated(family: str, stage: str) -> None:
    trained = STAGES[stage]
    config = config_of(wide(family))
    mllm = build_mllm(config, {}, Precision.bf16, trained).train()
    supervised = len(packed((LENGTH,), (True,)).targets)
    estimate = memory(config, LENGTH, 1, supervised, trained).sample
    assert is_counted(wide(family)["model_type"])
    assert estimate == pytest.approx(kept_bytes(mllm, LENGTH), rel=0.03)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tied", [True, False])
def test_state_is_weights_gradients_moments_and_copies(stage: str, tied: bool) -> None:
    config = config_of(wide("llama") | {"tie_word_embeddings": tied})
    trained = STAGES[stage]
    mllm = build_mllm(config, {}, Precision.bf16, trained)
    assert memory(config, 1, 0, 0, trained).state == pytest.approx(_state(mllm, trained), rel=0.02)


def _state(mllm: MLLM, trained: Collection[Part]) -> int:
    total = 0
    for part in Part:
        module: nn.Module = mllm.get_submodule(part.name)
        for parameter in module.parameters():
            copies = 3 * 4 + (2 if parameter.dim() == 2 else 0) if part in trained else 0
            total += parameter.numel() * (parameter.element_size() + copies)
    embeddings = mllm.llm.get_input_embeddings().weight
    if Part.llm in trained and embeddings is not mllm.llm.get_output_embeddings().weight:
        total -= 2 * embeddings.numel()  # looked up, not multiplied: never copied
    return total


def test_a_published_cell_fits_where_people_trained_it() -> None:
    """8B parameters, trained: 18 bytes each; LLaMA-3.1 keeps 139 KB a frozen layer and token."""
    config = compose_config(["llm=llama31_8b", "vision=clip"]).config
    finetune = memory(config, 826, 1, 125, STAGES["finetune"])
    assert finetune.state / 18 == pytest.approx(8.03e9, rel=0.02)
    pretrain = memory(config, 601, 1, 20, STAGES["pretrain"])
    assert pretrain.sample / 601 / 32 == pytest.approx(139e3, rel=0.03)
    assert sizes(config).vision_weights == pytest.approx(303.5e6 * 23 / 24, rel=0.01)


def test_ranks_divide_what_their_strategy_shards() -> None:
    """In bytes a weight: everything; all but the bf16 weights; all but what is gathered."""
    config = compose_config(["llm=llama31_8b", "vision=clip"]).config
    trained = STAGES["finetune"]
    whole = memory(config, 1, 0, 0, trained).state
    for strategy in (Strategy.auto, Strategy.ddp):
        assert state_per_rank(config, trained, strategy, 64) == whole
    assert state_per_rank(config, trained, Strategy.zero2, 1) == pytest.approx(whole, rel=0.02)
    many = 10**6
    vision = 2 * sizes(config).vision_weights
    assert (state_per_rank(config, trained, Strategy.zero2, many) - vision) / 8.05e9 == pytest.approx(
        2, rel=0.05
    )
    for strategy in (Strategy.fsdp2, Strategy.zero3):
        states = [state_per_rank(config, trained, strategy, ranks) for ranks in (8, 16, many)]
        assert states[0] - states[1] == pytest.approx(16 * 8.05e9 / 16, rel=0.01)
        assert states[2] < 0.1 * whole


def test_only_the_loop_keeps_the_scores_of_a_soft_cap() -> None:
    config = compose_config(["llm=gemma2_9b", "vision=siglip2"]).config
    for trained in STAGES.values():
        loop, flex = (
            [memory(config, length, 0, 0, trained, 0, kind).sample for length in (1000, 2000)]
            for kind in (Attention.loop, Attention.flex)
        )
        assert loop[1] > 2 * loop[0]
        assert flex[1] == 2 * flex[0]
        assert flex[0] < loop[0]
    llama = compose_config(["llm=llama31_8b", "vision=clip"]).config
    same = {memory(llama, 1000, 0, 0, STAGES["pretrain"], 0, kind).sample for kind in Attention}
    assert len(same) == 1
