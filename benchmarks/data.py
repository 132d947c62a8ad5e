"""How many images per second and core the data workers deliver, beside a plain Hugging Face loader.

    python benchmarks/data.py [choice ...]        # e.g. clip clip:s2; 5 minutes on 2 cores, 2 GB

Photographs in the sizes of the study's data (scikit-learn's two, cropped, scaled, with noise; JPEG quality 75
to 95). Ours: MicroBatches' image route and Loader's settings. Theirs, as LLaVA does it: `Image.open`, RGB,
expand to a square, transformers' processor, floats, torch's DataLoader; with the PIL and the torchvision back
end. In turn, with equally many workers; the median of the rounds.

img/s: images per second of CPU time, of the workers and of the process they deliver to: what one core does.
worst, differ: the largest difference of any value from ours, in grey levels, and the share of the values that
differ. The PIL back end's grow with Pillow 13, which resizes some tall images the other way round.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset

from morebench.config.compose import compose_config, load_shape
from morebench.config.schema import AspectRatio, ImageProcessing, Resize
from morebench.data.batch import Batch, collate
from morebench.data.image_processor import ImageProcessor, mean_colour
from morebench.data.images import load_image
from morebench.models.normalise import Normalise

CHOICES = ("clip", "siglip", "dinov2", "clip:s2")
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (1024, 768), (300, 400), (375, 500), (640, 640))
PROCESSORS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip", "dinov2": "Bit", "dinov2_reg": "Bit"}
NUM_IMAGES, BATCH_SIZE, NUM_WORKERS, NUM_ROUNDS = 128, 8, 2, 5


@dataclass(frozen=True)
class Ours(Dataset[Batch]):
    """Item i is a micro-batch without its texts."""

    paths: list[Path]
    processor: ImageProcessor

    def __len__(self) -> int:
        return len(self.paths) // BATCH_SIZE

    def __getitem__(self, item: int) -> Batch:
        chunk = self.paths[item * BATCH_SIZE : (item + 1) * BATCH_SIZE]
        pixels = [self.processor(load_image(path)) for path in chunk]
        return collate([], pixels, range(BATCH_SIZE), 0, self.processor.image_size)

    def loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self, batch_size=None, num_workers=NUM_WORKERS, pin_memory=torch.cuda.is_available()
        )


@dataclass(frozen=True)
class Theirs(Dataset[torch.Tensor]):
    """Item i is one image, float32 [3, S, S]."""

    paths: list[Path]
    processor: Any
    padding: tuple[int, int, int] | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> torch.Tensor:
        image = Image.open(self.paths[item]).convert("RGB")
        side = max(image.size)
        if self.padding is not None and image.width != image.height:
            square = Image.new("RGB", (side, side), self.padding)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        pixels: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def loader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(
            self, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS, pin_memory=torch.cuda.is_available()
        )


def main(choices: list[str]) -> None:
    torch.set_num_threads(1)
    print(
        f"Pillow {PIL.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{'':22}{'ours':>6}{'PIL back end':>33}{'torchvision back end':>33}\n"
        f"{'encoder':10}{'pixels':>7}{'':5}{'img/s':>6}"
        + f"{'img/s':>9}{'ours x':>8}{'worst':>7}{'differ':>9}"
        * 2
    )
    with TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder))
        for choice in choices or CHOICES:
            for aspect_ratio in AspectRatio:
                compare(choice, aspect_ratio, paths)


def compare(choice: str, aspect_ratio: AspectRatio, paths: list[Path]) -> None:
    name, _, resolution = choice.partition(":")
    config = compose_config([f"vision={name}", f"resolution={resolution or 'native'}"]).config
    image, scale = config.vision.image, max(config.resolution.scales)
    size = load_shape(config.vision.shape)["image_size"] * scale
    ours = Ours(paths, ImageProcessor(image, size, aspect_ratio, scale))
    padding = mean_colour(image) if aspect_ratio is AspectRatio.pad else None
    theirs = [
        Theirs(paths, processor(PROCESSORS[name] + suffix, image, size, scale), padding)
        for suffix in ("ImageProcessorPil", "ImageProcessor")
    ]
    rates: list[list[float]] = [[], [], []]
    datasets: list[Ours | Theirs] = [ours, *theirs]
    for _ in range(NUM_ROUNDS):
        for kept, dataset in zip(rates, datasets, strict=True):
            kept.append(images_per_cpu_second(dataset))
    mine, *others = map(median, rates)
    row = f"{name:10}{size:7}{aspect_ratio.name:>7}{mine:6.0f}"
    for rate, dataset in zip(others, theirs, strict=True):
        worst, share = difference(ours, dataset, image)
        row += f"{rate:9.0f}{mine / rate:8.2f}{worst:7.2f}{share:9.2%}"
    print(row, flush=True)


def processor(name: str, image: ImageProcessing, size: int, scale: int) -> Any:
    wanted = scale * image.resize_to
    facts: dict[str, Any] = {
        "image_mean": image.mean,
        "image_std": image.std,
        "resample": Image.Resampling[image.interpolation.name.upper()],
    }
    if image.resize is Resize.squash:
        return getattr(transformers, name)(size={"height": wanted, "width": wanted}, **facts)
    return getattr(transformers, name)(size={"shortest_edge": wanted}, crop_size=size, **facts)


def images_per_cpu_second(dataset: Ours | Theirs) -> float:
    """Without what starting and ending the workers costs: that of a short run is taken off."""
    short = 2 * BATCH_SIZE
    spent = cpu_seconds_of(dataset) - cpu_seconds_of(replace(dataset, paths=dataset.paths[:short]))
    return (NUM_IMAGES - short) / spent


def cpu_seconds_of(dataset: Ours | Theirs) -> float:
    start = cpu_seconds()
    for _ in dataset.loader():
        pass
    return cpu_seconds() - start


def cpu_seconds() -> float:
    """Of this process and of all workers that have ended."""
    usages = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def difference(ours: Ours, theirs: Theirs, image: ImageProcessing) -> tuple[float, float]:
    """Of what the vision encoder gets: the largest in grey levels, the share of the values that differ."""
    normalise = Normalise(image)
    grey = 1 / 255 / torch.tensor(image.std)[:, None, None]
    found = []
    for item in range(len(SIZES)):
        pixels = torch.from_numpy(ours.processor(load_image(ours.paths[item]))[None])
        found.append(((normalise(pixels)[0] - theirs[item]).abs() / grey).flatten())
    levels = torch.cat(found)
    return levels.max().item(), (levels > 0.5).float().mean().item()


def write_photographs(folder: Path) -> list[Path]:
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    paths = []
    for number in range(NUM_IMAGES):
        source, (width, height) = sources[number % 2], SIZES[number % len(SIZES)]
        extent = rng.uniform(0.6, 1) * min(source.width / width, source.height / height)
        left = rng.uniform(0, source.width - extent * width)
        top = rng.uniform(0, source.height - extent * height)
        box = (left, top, left + extent * width, top + extent * height)
        scaled = np.asarray(source.resize((width, height), Image.Resampling.LANCZOS, box), dtype=np.float32)
        noisy = scaled + rng.normal(0, 3, (height, width, 1))
        path = folder / f"{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=int(rng.integers(75, 96)))
        paths.append(path)
    return paths


if __name__ == "__main__":
    main(sys.argv[1:])
