"""A finished finetune run, loaded to answer questions."""

from collections.abc import Sequence
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
        """Image tokens keep the places that the task gave them."""
        num_visual_tokens = self.mllm.vision.num_visual_tokens
        return self.chat.encode_prompt(question, self.tokenizer, num_visual_tokens, as_written=True)

    def end_token_ids(self) -> list[int]:
        return self.chat.end_token_ids(self.tokenizer)

    @torch.inference_mode()
    def encode(self, images: Sequence[StoredImage]) -> Tensor:
        """-> visual tokens `[I, V, D]` on the model's device. Raises SampleError."""
        width = self.mllm.llm.config.hidden_size
        pieces = [torch.zeros(0, self.mllm.vision.num_visual_tokens, width, device=self.device)]
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            pixels = torch.from_numpy(np.stack([self.processor(image.load()) for image in chunk]))
            pieces.append(self.mllm.encode_images(pixels.to(self.device)))
        return torch.cat(pieces)


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
