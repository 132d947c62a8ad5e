"""An answer does not depend on what was answered beside it, on any family; real classes, random weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from factories_evaluation import FAMILIES, byte_tokenizer, chat_format, tiny_mllm
from PIL import Image

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.image_processor import ImageProcessor
from morebench.evaluation.generate import (
    Answer,
    Generator,
    Request,
)
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import LoadedModel

NUM_QUESTIONS = 24
# phi3 with longrope rotates otherwise beyond a length that some prompts have, some answers cross, some never.
KINDS = (*FAMILIES, "longrope")
LIMIT = 44
LAYOUTS = ["<image>{}", "<image>{}", "<image><image>{}", "see <image> and <image>: {}", "{}"]


class Asked(LoadedModel):
    """Every sixth id ends an answer, so that rows end at different steps."""

    def end_token_ids(self) -> list[int]:
        return list(range(0, len(self.tokenizer), 6))


@dataclass(frozen=True)
class Case:
    model: Asked
    requests: list[Request]
    expected: list[tuple[str, bool]]  # text, ended

    def answer(self, chosen: Sequence[int]) -> list[Answer]:
        return Generator(self.model).answer([self.requests[i] for i in chosen])


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def make_model(kind: str) -> Asked:
    family = "phi3" if kind == "longrope" else kind
    tokenizer = byte_tokenizer(family)
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 6.0]}
    changes = {"rope_scaling": longrope, "original_max_position_embeddings": LIMIT}
    mllm = tiny_mllm(family, tokenizer, **(changes if kind == "longrope" else {}))
    processing = ImageProcessing(
        resize=Resize.squash,
        resize_to=24,
        interpolation=Interpolation.bilinear,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    processor = ImageProcessor(processing, 24, AspectRatio.square)
    nothing: Any = None
    return Asked(mllm, tokenizer, chat_format(family), processor, 8, nothing)


def make_case(kind: str) -> Case:
    model = make_model(kind)
    generator = np.random.default_rng(1)
    images = [noise(n) for n in range(3)]
    requests = []
    for _ in range(NUM_QUESTIONS):
        text = bytes(generator.integers(97, 123, generator.integers(1, 25))).decode()
        layout = generator.choice(
            ["<image>{}", "<image>{}", "<image><image>{}", "see <image> and <image>: {}", "{}"]
        )
        shown = tuple(images[generator.integers(3)] for _ in range(layout.count("<image>")))
        requests.append(Request(model.prompt(layout.format(text)), shown, int(generator.integers(1, 12))))
    requests.append(Request(model.prompt("a question before <image>"), (images[0],), 5))
    return Case(model, requests, [one_at_a_time(model, request) for request in requests])


def noise(number: int) -> StoredImage:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return StoredImage(f"noise {number}", f"{number}.png", lambda: Image.fromarray(pixels))


@torch.no_grad()
def one_at_a_time(model: Asked, request: Request) -> tuple[str, bool]:
    """The answer without a cache, a batch or a pad: the whole sequence anew for every token."""
    mllm, ids = model.mllm, []
    embeds_TD = mllm.embed(
        torch.from_numpy(request.prompt.input_ids).long(),
        torch.from_numpy(request.prompt.visual_mask).nonzero()[:, 0],
        model.encode(request.images),
    )
    for _ in range(request.max_new_tokens):
        output = mllm.llm.base_model(
            inputs_embeds=embeds_TD[None],
            position_ids=torch.arange(len(embeds_TD))[None],
            use_cache=False,
            cu_seqlens=[0, len(embeds_TD)],
        )
        best = int(mllm.logits(output.last_hidden_state[0, -1]).argmax())
        if best in model.end_token_ids():
            return model.tokenizer.decode(ids, skip_special_tokens=True), True
        ids.append(best)
        embeds_TD = torch.cat([embeds_TD, mllm.llm.get_input_embeddings()(torch.tensor([best]))])
    return model.tokenizer.decode(ids, skip_special_tokens=True), False


def test_equals_generation_one_at_a_time_without_a_cache(case: Case) -> None:
    found = case.answer(range(len(case.requests)))
    assert sum(answer.near_ties for answer in found) == 0
    assert [(answer.text, answer.ended) for answer in found] == case.expected
