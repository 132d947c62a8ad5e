"""What the model is fed: one bin of samples as one sequence without padding.

Shape suffixes in this project: I images, T tokens, S supervised tokens, N samples, V visual tokens per
image, D LLM width, C vision width, H/W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from morebench.data.chat import Encoded


class Batch(NamedTuple):  # not a dataclass: Lightning cannot move a frozen one to a device
    input_ids: Tensor  # int64 [T]; 0 at visual tokens
    position_ids: Tensor  # int64 [T]; restart at every sample
    cu_seqlens: Tensor  # int32 [N + 1]; sample n is cu_seqlens[n]:cu_seqlens[n + 1]
    visual_positions: Tensor  # int64 [I * V]; in the order of pixel_values
    pixel_values: Tensor  # uint8 [I, H, W, 3]
    features: Tensor  # [I, V, C]; of a cache, and then there are no pixel_values; int8 or the encoder's dtype
    feature_scales: Tensor  # float32 [I, V, G]; G is 0 but for int8
    target_positions: Tensor  # int64 [S]; where a supervised token is predicted, one before it
    targets: Tensor  # int64 [S]
    num_supervised: Tensor  # int64 []; of the whole global batch: the denominator of the loss
    sample_ids: Tensor  # int64 [N]


def collate(
    encoded: Sequence[Encoded],
    pixel_values: Sequence[np.ndarray],
    sample_ids: Sequence[int],
    num_supervised_global: int,
    image_size: int,
    features: Sequence[tuple[Tensor, Tensor]] = (),
) -> Batch:
    """`pixel_values` are uint8 [H, W, 3], those of the first sample first. All may be empty.

    `features` and their scales (`FeatureCache.read`) are there instead of pixels, in the same order.
    """
    lengths = np.array([len(sample.input_ids) for sample in encoded], dtype=np.int64)
    cu_seqlens = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    input_ids = _join([sample.input_ids for sample in encoded], np.int64)
    visual_mask = _join([sample.visual_mask for sample in encoded], np.bool_)
    supervised = _join([sample.supervised for sample in encoded], np.bool_)
    supervised[cu_seqlens[:-1][lengths > 0]] = False  # nothing precedes a sample's first token
    target_positions = np.flatnonzero(supervised) - 1
    images = np.stack(pixel_values) if pixel_values else np.zeros((0, image_size, image_size, 3), np.uint8)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        visual_positions=torch.from_numpy(np.flatnonzero(visual_mask)),
        pixel_values=torch.from_numpy(images),
        features=torch.stack([values for values, _ in features]) if features else torch.zeros(0, 0, 0),
        feature_scales=torch.stack([scales for _, scales in features]) if features else torch.zeros(0, 0, 0),
        target_positions=torch.from_numpy(target_positions),
        targets=torch.from_numpy(input_ids[target_positions + 1]),
        num_supervised=torch.tensor(num_supervised_global),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
    )


def _join(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
