"""Chat formats are data: a list of segments with an explicit trained flag (conf/chat_formats)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoded:
    input_ids: np.ndarray  # int32 [T]; 0 at visual tokens
    supervised: np.ndarray  # bool [T]
    visual_mask: np.ndarray  # bool [T]
    truncated: bool
