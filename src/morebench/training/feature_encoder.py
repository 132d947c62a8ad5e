"""Images in groups, and the frozen encoder that turns them into features: what a cache is built of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from morebench.config.schema import AspectRatio, Config
from morebench.data.checked import CheckedData
from morebench.data.features import ImageNumbers
from morebench.data.image_processor import ImageProcessor
from morebench.data.images import decode_image
from morebench.models.features import encode
from morebench.models.normalise import Normalise
from morebench.models.parts import build_encoder
from morebench.models.weights import locate
from morebench.training.features import CacheOf

_TILES_PER_CALL = 64  # through the encoder at once: enough for a GPU, and bearable for a CPU

Encode = Callable[
    [Tensor], Tensor
]  # what the data workers give -> features [I, V, C] on the encoder's device


@dataclass(frozen=True, eq=False)
class ImageGroups(Dataset[Tensor]):
    """Item: the numbers of some images -> their pixels, stacked."""

    images: ImageNumbers
    data: CheckedData
    processor: ImageProcessor

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self._pixels(number) for number in numbers]))

    def _pixels(self, number: int) -> np.ndarray:
        name, in_check = self.images.names[number].as_py(), int(self.images.in_check[number])
        return self.processor(decode_image(self.data.read_image(name, in_check)))


def make_encoder(
    config: Config, cache: CacheOf, images: ImageNumbers, data: CheckedData, aspect_ratio: AspectRatio
) -> tuple[ImageGroups, Encode]:
    """What is encoded, and what encodes it, on a GPU if the trainer may use one. Raises WeightsError."""
    vision = build_encoder(config, locate(config.vision.weights, config.paths))
    assert isinstance(vision, nn.Module)
    device = torch.device(
        "cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    )
    vision.eval().requires_grad_(False).to(device, cache.dtype)
    normalise = Normalise(config.vision.image).to(device)
    processor = ImageProcessor(
        config.vision.image, vision.image_size, aspect_ratio, max(config.resolution.scales)
    )
    return ImageGroups(images, data, processor), lambda pixels: encode(
        normalise, vision, pixels.to(device, non_blocking=True)
    )


def images_per_call(scales: Sequence[int]) -> int:
    return max(1, _TILES_PER_CALL // sum(scale**2 for scale in scales))


def loader(dataset: ImageGroups, groups: Sequence[tuple[int, ...]], num_workers: int) -> DataLoader[Tensor]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=groups,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def images_per_second(
    dataset: ImageGroups, encode: Encode, per_call: int, num_workers: int, seconds: float = 10.0
) -> tuple[float, int]:
    """Of decoding in `num_workers` processes and encoding, whichever is slower; and how many were measured.

    Measured on the first images, one call after another until `seconds` have passed; the first call warms up.
    """
    numbers = range(min(len(dataset.images), 8 * per_call))
    encode(dataset[numbers[:per_call]])
    decode_s = encode_s = 0.0
    measured = 0
    for at in range(0, len(numbers), per_call):
        group = numbers[at : at + per_call]
        begun = time.monotonic()
        pixels = dataset[group]
        decoded = time.monotonic()
        encode(pixels).cpu()  # waits for the device
        decode_s += decoded - begun
        encode_s += time.monotonic() - decoded
        measured += len(group)
        if decode_s + encode_s > seconds:
            break
    slower = max(encode_s, decode_s / num_workers) if num_workers else encode_s + decode_s
    return measured / slower, measured
