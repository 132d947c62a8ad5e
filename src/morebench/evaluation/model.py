"""A finished finetune run, loaded to answer questions."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morebench.config.compose import load_chat_format
from morebench.config.schema import LLM, Config, Part
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.image_processor import ImageProcessor
from morebench.evaluation.items import StoredImage
from morebench.models.llm import load_tokenizer
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, load_part
from morebench.models.weights import starting_weights

# What encoding them takes does not grow with the number of questions.
_IMAGES_AT_ONCE = 32
_READERS = 8
_GIB_ON_A_CPU = 2.0


@dataclass(frozen=True)
class LoadedModel:
    mllm: MLLM
    tokenizer: Any
    chat: ChatFormat
    processor: ImageProcessor
    batch_size: int  # questions answered at once
    llm: LLM

    @property
    def device(self) -> torch.device:
        return self.mllm.llm.device

    def prompt(self, question: str) -> Encoded:
        return self.chat.encode_prompt(question, self.tokenizer, self.mllm.vision.num_visual_tokens)

    def end_token_ids(self) -> list[int]:
        return self.chat.end_token_ids(self.tokenizer)

    @torch.inference_mode()
    def encode(self, images: Sequence[StoredImage]) -> Tensor:
        """-> visual tokens `[I, V, D]` on the model's device. Raises SampleError."""
        width = self.mllm.llm.config.hidden_size
        pieces = [torch.zeros(0, self.mllm.vision.num_visual_tokens, width, device=self.device)]
        with ThreadPoolExecutor(_READERS) as pool:  # the next ones are read while the device encodes
            read = [
                pool.map(self._pixels, images[start : start + _IMAGES_AT_ONCE])
                for start in range(0, len(images), _IMAGES_AT_ONCE)
            ]
            for batch in read:
                pixels = torch.from_numpy(np.stack(list(batch)))
                pieces.append(self.mllm.encode_images(pixels.to(self.device)))
        return torch.cat(pieces)

    def _pixels(self, image: StoredImage) -> np.ndarray:
        return self.processor(image.load())

    def cache_positions(self, gib: float | None) -> int:
        """How much of the LLM's cache fits. None: half of what is free on a GPU, 2 GiB on a CPU.

        The other half is for images and for what a pass over the LLM computes.
        """
        if gib is None:
            on_gpu = self.device.type == "cuda"
            gib = torch.cuda.mem_get_info(self.device)[0] / 2 / 2**30 if on_gpu else _GIB_ON_A_CPU
        config = self.mllm.llm.config
        num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # keys and values
        bytes_each = 2 * config.num_hidden_layers * num_key_heads * head_dim * self.mllm.llm.dtype.itemsize
        return int(gib * 2**30) // bytes_each


def load_model(config: Config, parent: Path, device: torch.device) -> LoadedModel:
    """`parent`: folder of the finetune run. Raises WeightsError."""
    weights = starting_weights(config)
    tokenizer = load_tokenizer(config.llm, weights[Part.llm])
    chat = ChatFormat.from_dict(load_chat_format(config.stage.finetune.chat_format or config.llm.chat_format))
    chat.check(tokenizer)
    # Built from the starting folders first: their config.json has more fields than the shape.
    mllm = build_mllm(config, weights, config.stage.evaluate.precision)
    for part in dict.fromkeys([Part.projector, *config.stage.finetune.trainable]):
        load_part(mllm, part, parent / f"{part.name}.safetensors")
    processor = ImageProcessor(
        config.vision.image,
        mllm.vision.image_size,
        config.stage.evaluate.image_aspect_ratio,
        max(config.resolution.scales),
    )
    mllm.eval().to(device)
    return LoadedModel(mllm, tokenizer, chat, processor, config.trainer.evaluate_batch_size, config.llm)
