"""What a feature cache costs and when it pays, said before anything is written."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from morebench.config.schema import Config, TrainRecipe
from morebench.data.features import ImageNumbers
from morebench.errors import DiskFullError, join_problems
from morebench.models.flops import sample_flops, sizes
from morebench.training.features import CacheOf


@dataclass(frozen=True)
class Need:
    """Bytes on one file system."""

    cache: CacheOf
    total: int
    there: int


def check_disk(needs: Sequence[Need]) -> None:
    """Raises DiskFullError unless all of these fit together on each of the file systems they go to."""
    problems = []
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        by_disk.setdefault(_existing(need.cache.place).stat().st_dev, []).append(need)
    for together in by_disk.values():
        place = _existing(together[0].cache.place)
        missing, free = sum(need.total - need.there for need in together), free_bytes(place)
        if missing > free:
            problems.append(
                f"feature caches ({len(together)}) need {size(missing)} more, but {size(free)} are free on "
                f"the disk of {place}. Make room, set paths.cache, or set features=cached_8bit."
            )
    if problems:
        raise DiskFullError(join_problems(problems))


def free_bytes(place: Path) -> int:
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists())


def encoded_by_a_run(recipe: TrainRecipe, num_samples: int, images: ImageNumbers) -> int:
    """Images that a run without a cache encodes; each time that a sample comes, each of its images."""
    all_of_them = images.shown * recipe.epochs
    if recipe.max_steps is None:
        return all_of_them
    samples = min(recipe.max_steps * recipe.global_batch_size, num_samples * recipe.epochs)
    return round(images.shown * samples / num_samples)


def break_even(distinct: int, by_a_run: int) -> tuple[int, str]:
    """The number of runs from which on a cache saves work, and why."""
    runs = distinct // by_a_run + 1
    once = f"building encodes {distinct:,} images, a run by itself {by_a_run:,}"
    ordinal = {1: "with the first run", 2: "from the second run on that shares it"}
    return runs, f"{once}: it pays {ordinal.get(runs, f'from {runs} runs on that share it')}"


def vision_share(config: Config, recipe: TrainRecipe, text: int, supervised: int) -> float:
    """Of the FLOPs of a sample with an image and `text` tokens."""
    model = sizes(config)
    length = model.num_visual_tokens + text
    return model.vision_image / int(sample_flops(model, length, 1, supervised, recipe.trainable))


def describe(
    need: Need,
    num_images: int,
    by_a_run: int,
    pace: tuple[float, int] | None,
    shares: Mapping[str, float],
    step: str,
    text: int,
) -> Iterator[str]:
    """Lines for people. `pace`: images/s, and how many were measured; `shares`: the encoder's, by LLM."""
    cache = need.cache
    yield f"{cache.name} ({cache.storage})"
    yield (
        f"  {num_images:,} images x {cache.image_bytes:,} bytes = {size(need.total)}; {size(need.there)} "
        f"there already, {size(free_bytes(cache.place))} free"
    )
    if pace is not None:
        rate, measured = pace
        left = math.ceil(num_images * (1 - need.there / max(1, need.total)) / rate)
        told = f"{rate:,.{0 if rate >= 100 else 1}f} images/s ({measured} measured on this machine)"
        yield f"  {told}: {timedelta(seconds=left)} left"
    yield f"  {break_even(num_images, by_a_run)[1]}"
    told = ", ".join(f"{share:.0%} with {llm}" for llm, share in shares.items())
    yield (
        f"  a run then saves decoding, and of {step}'s FLOPs the encoder's share: {told} "
        f"({text} text tokens a sample)"
    )


def size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,.0f} bytes"
