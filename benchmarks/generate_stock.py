"""The same questions answered by transformers alone: `LlavaForConditionalGeneration.generate`, in batches
padded on the left. Its pixels are ready in memory.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from morebench.config.compose import load_shape
from morebench.config.schema import Config
from morebench.evaluation.generate import Request
from morebench.evaluation.model import LoadedModel
from morebench.models.transformers_export import to_llava


class Stock:
    """The weights of `model`, which it shares where it can."""

    def __init__(self, config: Config, model: LoadedModel, requests: Sequence[Request], size: int) -> None:
        mllm, device = model.mllm, model.device
        dtype = mllm.llm.dtype
        self._image_token_id = len(model.tokenizer)  # a row of its own behind the vocabulary
        exported = to_llava(mllm.cpu(), load_shape(config.vision.shape), self._image_token_id, dtype)
        mllm.to(device)
        self._llava = _runnable(exported, device)
        self._model = model
        pixels = {
            image.key: mllm.normalise(torch.from_numpy(model.processor(image.load()))[None].to(device)).to(
                dtype
            )
            for image in {image.key: image for request in requests for image in request.images}.values()
        }
        self._batches = [
            self._batch(requests[start : start + size], pixels) for start in range(0, len(requests), size)
        ]

    @torch.inference_mode()
    def answer(self, num_batches: int | None = None) -> list[str]:
        texts = []
        for batch, max_new_tokens in self._batches[:num_batches]:
            ids_BT = self._llava.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._model.end_token_ids(),
                pad_token_id=self._model.tokenizer.eos_token_id,
            )
            new_BT = ids_BT[:, batch["input_ids"].shape[1] :].cpu()
            texts += self._model.tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        return texts

    def _batch(self, requests: Sequence[Request], pixels: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        longest = max(len(request.prompt.input_ids) for request in requests)
        ids_BT = np.full((len(requests), longest), self._model.tokenizer.eos_token_id)
        mask_BT = np.zeros((len(requests), longest), np.int64)
        for row, request in enumerate(requests):
            prompt = request.prompt
            start = longest - len(prompt.input_ids)
            ids_BT[row, start:] = np.where(prompt.visual_mask, self._image_token_id, prompt.input_ids)
            mask_BT[row, start:] = 1
        batch = {
            "input_ids": torch.from_numpy(ids_BT),
            "attention_mask": torch.from_numpy(mask_BT),
            "pixel_values": torch.cat([pixels[image.key] for one in requests for image in one.images]),
        }
        moved = {key: value.to(self._model.device) for key, value in batch.items()}
        return moved, max(request.max_new_tokens for request in requests)


def _runnable(exported: LlavaForConditionalGeneration, device: torch.device) -> LlavaForConditionalGeneration:
    """What `to_llava` makes is to be saved: its rotary tables are on no device."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(exported.dtype)
    try:
        with torch.device(device):  # a GPU draws billions of weights in a second
            llava = LlavaForConditionalGeneration(exported.config)
    finally:
        torch.set_default_dtype(former)
    llava.load_state_dict(exported.state_dict(), assign=True)
    llava.tie_weights()
    return llava.to(device).eval()
