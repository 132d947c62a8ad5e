"""What does it change to resample DINOv2's 37 x 37 positions to 16 x 16 with or without antialiasing?

    python benchmarks/dinov2_positions.py        # about a minute on two cores, 4 GB of memory

transformers resamples plain DINOv2 without, DINOv2 with registers with antialiasing; timm always with it.
Both encoders at full size with random weights and one image of noise; the positions are noise from patch to
patch, or smooth (noise at 6 x 6, drawn larger), at the same standard deviation. Prints the difference of the
positions themselves and of the features: relative L2, and the largest over the features' standard deviation.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from morebench.config.compose import build, compose_config, load_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_vision import MODEL_TYPES, as_timm, saved, stock_model

SMOOTH = 6  # the smooth grid is noise at SMOOTH x SMOOTH, drawn larger


def main() -> None:
    print(f"{'encoder':12}{'positions':11}{'grid, L2':>10}{'features, L2':>14}{'features, max':>15}")
    for choice in ("dinov2", "dinov2_reg"):
        vision = compose_config([f"vision={choice}"]).config.vision
        shape = load_shape(vision.shape)
        state = as_timm(stock_model(MODEL_TYPES[choice], shape))
        for kind in ("noise", "smooth"):
            state["pos_embed"] = positions(state["pos_embed"], shape, kind)
            pairs = [with_antialias(vision, shape, state, flag) for flag in (False, True)]
            grids, features = zip(*pairs, strict=True)
            largest = (features[1] - features[0]).abs().max() / features[0].std()
            print(
                f"{choice:12}{kind:11}{relative(*grids):10.4f}{relative(*features):14.4f}{largest:15.2f}",
                flush=True,
            )


def positions(positions_1PC: Tensor, shape: dict, kind: str) -> Tensor:
    size = shape["pretrain_image_size"] // shape["patch_size"]
    noise = torch.randn(1, shape["width"], size, size, generator=torch.Generator().manual_seed(2))
    if kind == "smooth":
        noise = interpolate(noise[..., :SMOOTH, :SMOOTH], size=(size, size), mode="bicubic")
    grid = 0.5 * noise / noise.std()
    prefix = positions_1PC[:, : positions_1PC.shape[1] - size**2]
    return torch.cat([prefix, grid.flatten(2).mT], dim=1)


@torch.no_grad()
def with_antialias(vision, shape: dict, state: dict[str, Tensor], antialias: bool) -> tuple[Tensor, Tensor]:
    """(positions, features), both `[1, ., C]`."""
    shape = shape | {"position_antialias": antialias}
    with TemporaryDirectory() as folder:
        encoder = build(
            vision.encoder,
            shape=shape,
            weights=saved(state, Path(folder)),
            feature_layer=vision.feature_layer,
        )
    size = shape["image_size"]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return encoder.model.pos_embed[:, -encoder.num_visual_tokens :], encoder.eval()(pixels)


def relative(one: Tensor, other: Tensor) -> float:
    return ((other - one).norm() / one.norm()).item()


if __name__ == "__main__":
    main()
