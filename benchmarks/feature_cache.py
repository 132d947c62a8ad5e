"""What a feature cache saves: the step of a tiny S2 cell, and images of a real encoder at S2.

    python benchmarks/feature_cache.py [choice=clip] [device=cpu]   # some minutes on two cores, 5 GB

Random weights, images of 30 to 73 pixels. The steps of both cells are taken in turns. Reading is from
files that were dropped from the page cache, with their checksums. bf16 on a GPU, else fp32. Last, what 8 bits
cost in accuracy.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from morebench.config.schema import Config, Features, Precision, Step
from morebench.data.features import FeatureCache
from morebench.models.features import from_8bit, to_8bit
from morebench.training.stage import Stage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_features import Encoder, feature_cell, stage_of
from factories_training import with_recipe, with_trainer

ROUNDS = 5
S2 = [1, 2, 3]


def main(choice: str = "clip", device: str = "cpu") -> None:
    with TemporaryDirectory() as tiny:
        print("\n".join(tiny_steps(feature_cell(Path(tiny), scales=S2), Path(tiny))), flush=True)
    with TemporaryDirectory() as real:
        config = with_trainer(feature_cell(Path(real), choice, scales=S2), accelerator=device)
        if device != "cpu":
            config = with_recipe(config, precision=Precision.bf16)
        for line in real_images(config, num_images=64 if device != "cpu" else 2):
            print(line, flush=True)


def tiny_steps(config: Config, root: Path) -> Iterator[str]:
    Encoder(config).build(shard_images=1000)
    cells = {"computed": replace(config, features=Features.computed), "cached": config}
    stages = {name: stage_of(cell, Step.pretrain, root / "parent") for name, cell in cells.items()}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(ROUNDS + 1):
        for name, stage in stages.items():
            seconds[name].append(step(stage))
    took = {name: median(times[1:]) for name, times in seconds.items()}
    both = f"{took['computed']:.3f} s, cached {took['cached']:.3f} s"
    yield f"tiny CLIP at S2, pretrain step of 16 samples: {both}"


def step(stage: Stage) -> float:
    begun = time.perf_counter()
    batch = stage.dataset(stage.plan(1, 1), 0)[0]
    (stage.mllm(batch) / batch.num_supervised).backward()
    return time.perf_counter() - begun


def real_images(config: Config, num_images: int) -> Iterator[str]:
    encoder = Encoder(config)
    cache = encoder.cache
    encoder.images = replace(encoder.images, names=encoder.images.names[:num_images])
    encoder.dataset = replace(encoder.dataset, images=encoder.images)
    begun = time.perf_counter()
    encoder.build(shard_images=1000, per_call=encoder.per_call)
    encoded = (time.perf_counter() - begun) / num_images
    reader = FeatureCache(cache.folder, encoder.images, "")
    for path in cache.folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    begun = time.perf_counter()
    features = torch.stack([reader.read(number)[0] for number in reversed(range(num_images))])
    read = (time.perf_counter() - begun) / num_images
    shape = "x".join(map(str, features.shape[1:]))
    yield f"{cache.name}: {shape} {cache.storage}, {cache.image_bytes / 1e6:.2f} MB an image"
    rate = cache.image_bytes / read / 1e6
    yield f"  {encoded:.3f} s to encode and write, {read:.4f} s to read: {rate:,.0f} MB/s in one process"
    exact = features.float()
    error = ((from_8bit(*to_8bit(features)) - exact).norm() / exact.norm()).item()
    bf16 = ((exact.bfloat16().float() - exact).norm() / exact.norm()).item()
    yield f"  relative error of 8 bits {error:.4f}; of bf16 {bf16:.4f}"


if __name__ == "__main__":
    main(*(argument.partition("=")[2] for argument in sys.argv[1:]))
