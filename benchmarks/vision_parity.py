"""Are the features of the study's vision encoders those of transformers? At full width, depth and input size.

    python benchmarks/vision_parity.py [choice ...]        # about two minutes on two cores, 6 GB of memory

Random weights, one image of noise, fp32. Builds each choice of conf/vision as a cell does and transformers'
whole model, moves the weights from one layout to the other, and compares with `hidden_states[-2]`.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from morebench.config.compose import build, compose_config, load_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_vision import MODEL_TYPES, as_open_clip, as_timm, patch_features, saved, stock_model


def main(choices: list[str]) -> None:
    print(
        f"{'encoder':12}{'tokens':>8}{'width':>7}{'max |difference|':>18}{'max |feature|':>15}{'seconds':>9}"
    )
    for choice in choices or MODEL_TYPES:
        start = time.perf_counter()
        tokens, width, difference, largest = compare(choice)
        seconds = time.perf_counter() - start
        print(f"{choice:12}{tokens:8}{width:7}{difference:18.1e}{largest:15.2f}{seconds:9.1f}", flush=True)


@torch.no_grad()
def compare(choice: str) -> tuple[int, int, float, float]:
    """(tokens, width, largest difference, largest feature)"""
    vision = compose_config([f"vision={choice}"]).config.vision
    shape = load_shape(vision.shape)
    model = stock_model(MODEL_TYPES[choice], shape)
    size = shape["image_size"]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = patch_features(model, shape["prefix_tokens"], pixels, vision.feature_layer)
    state = (as_open_clip if choice == "clip" else as_timm)(model)
    with TemporaryDirectory() as folder:
        saved(state, Path(folder))
        del model, state
        encoder = build(vision.encoder, shape=shape, weights=Path(folder), feature_layer=vision.feature_layer)
    features = encoder.eval()(pixels)
    return *features.shape[1:], (features - expected).abs().max().item(), expected.abs().max().item()


if __name__ == "__main__":
    main(sys.argv[1:])
