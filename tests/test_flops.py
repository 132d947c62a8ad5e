import subprocess
import sys

import numpy as np
import pytest

from morebench.config.compose import compose_config
from morebench.config.schema import Part
from morebench.models.flops import Sizes, sample_flops, sizes

PRETRAIN, FINETUNE = {Part.projector}, {Part.projector, Part.llm}


def of(*overrides: str) -> Sizes:
    return sizes(compose_config(list(overrides)).config)


@pytest.mark.parametrize(
    ("llm", "billions"),
    [
        ("gemma2_2b", 2.02),
        ("gemma2_9b", 8.32),
        ("phi4", 3.22),
        ("llama31_8b", 6.98),
        ("vicuna_7b", 6.48),
        ("phi2", 2.52),
    ],
)
def test_bodies_have_the_published_sizes(llm: str, billions: float) -> None:
    assert round(of(f"llm={llm}").llm_body / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("llm", "vision", "resolution", "pretrain", "finetune"),
    [
        ("gemma2_2b", "clip", "native", 5.43, 11.10),
        ("phi4", "clip", "native", 8.43, 17.25),
        ("llama31_8b", "clip", "native", 17.55, 35.97),
        ("deepseek_r1_llama_8b", "clip", "native", 17.55, 35.97),
        ("gemma2_9b", "clip", "native", 20.89, 43.08),
        ("phi4", "dinov2", "native", 3.90, 10.57),
        ("phi4", "dinov2_reg", "native", 3.90, 10.57),
        ("phi4", "siglip", "native", 10.82, 20.67),
        ("phi4", "siglip2", "native", 10.82, 20.67),
        ("phi4", "clip", "s2", 13.41, 22.23),
        ("phi4", "siglip2", "s2", 19.50, 29.35),
        ("gemma2_9b", "dinov2", "native", 9.70, 26.41),
        ("gemma2_9b", "siglip2", "native", 26.50, 51.30),
        ("gemma2_9b", "clip", "s2", 25.87, 48.06),
        ("gemma2_9b", "siglip2", "s2", 35.19, 59.99),
    ],
)
def test_a_sample_costs_what_was_worked_out_by_hand(
    llm: str, vision: str, resolution: str, pretrain: float, finetune: float
) -> None:
    """TFLOP worked out apart from this code, with the last vision block, which we do not build."""
    model = of(f"llm={llm}", f"vision={vision}", f"resolution={resolution}")
    tokens = model.num_visual_tokens
    assert sample_flops(model, tokens + 25, 1, 20, PRETRAIN) / 1e12 == pytest.approx(pretrain, rel=0.02)
    assert sample_flops(model, tokens + 250, 1, 125, FINETUNE) / 1e12 == pytest.approx(finetune, rel=0.02)


@pytest.mark.parametrize(
    ("vision", "layer", "resolution"),
    [("clip", -22, "s2"), ("dinov2_reg", -1, "native"), ("siglip", -20, "s2")],
)
def test_an_image_costs_what_torch_counts(vision: str, layer: int, resolution: str) -> None:
    """The encoder as it is built, at its true size, on a device without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from morebench.models.parts import build_encoder

    overrides = [f"vision={vision}", f"vision.feature_layer={layer}", f"resolution={resolution}"]
    config = compose_config(overrides).config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder = build_encoder(config, None)
        encoder(torch.empty(1, 3, encoder.image_size, encoder.image_size))
    assert sizes(config).vision_image == counter.get_total_flops()


def test_small_numbers_by_hand() -> None:
    model = Sizes(
        llm_body=10,
        llm_layers=2,
        llm_width=3,
        attention_width=4,
        vocab_size=5,
        projector=(6, 7),
        vision_weights=1000,
        vision_image=100,
        num_visual_tokens=8,
    )
    body, attention, head = 10 * 20, 6 * 4 * 2 * 20 * 20, 3 * 5 * 9
    projector = 8 * (4 * 13 + 2 * 7)
    assert sample_flops(model, 20, 1, 9, PRETRAIN) == 4 * body + attention + 4 * head + projector + 100
    assert sample_flops(model, 20, 0, 9, FINETUNE) == 6 * body + attention + 6 * head


def test_arrays_are_priced_like_single_samples() -> None:
    model = of("llm=gemma2_9b")
    lengths, images, supervised = np.array([[600, 2000], [1, 0], [20, 500]])
    assert sample_flops(model, lengths, images, supervised, FINETUNE).tolist() == [
        sample_flops(model, 600, 1, 20, FINETUNE),
        sample_flops(model, 2000, 0, 500, FINETUNE),
    ]


@pytest.mark.parametrize("module", ["flops", "memory", "weights"])
def test_planning_needs_no_torch(module: str) -> None:
    code = f"import sys, morebench.models.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
