"""From the suite to requests, from requests to answers: the same in every process of an evaluate step."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from morebench.config.compose import load_chat_format, load_shape
from morebench.config.schema import Config, Part
from morebench.config.visual import num_visual_tokens
from morebench.data.chat import ChatFormat, Encoded
from morebench.evaluation.generate import Generator, Request, generation_attention
from morebench.evaluation.model import load_model
from morebench.evaluation.sheets import Sheet
from morebench.models.llm import load_tokenizer
from morebench.models.rope import check_answers
from morebench.models.weights import starting_weights
from morebench.training.choices import threads_for
from morebench.training.strategy import exact_arithmetic


@dataclass(frozen=True)
class Asked:
    """`places`: of every request its sheet, and its position among the sheet's items. `hashes`: what makes a
    prediction stale."""

    sheets: Sequence[Sheet]
    places: Sequence[tuple[int, int]]
    requests: Sequence[Request]
    hashes: Sequence[dict[str, str]]

    @property
    def digest(self) -> str:
        """Two processes that have the same one ask the same."""
        return hashlib.sha256("".join(v for h in self.hashes for v in h.values()).encode()).hexdigest()

    def by_sheet(self) -> list[dict[int, dict[str, str]]]:
        """For every sheet, item index -> its hashes."""
        found: list[dict[int, dict[str, str]]] = [{} for _ in self.sheets]
        for (sheet, at), hashes in zip(self.places, self.hashes, strict=True):
            found[sheet][self.sheets[sheet].task.items[at].index] = hashes
        return found


@dataclass(frozen=True)
class Answered:
    """One chunk. `answers`: fields of an Answer, in the chunk's order."""

    answers: Sequence[dict[str, Any]]
    seconds: float  # that one device took


def ask(config: Config, sheets: Sequence[Sheet]) -> Asked:
    """Raises WeightsError without a tokenizer, ConfigError if it cannot write the chat format, DataError for
    prompts that are too long."""
    tokenizer = load_tokenizer(config.llm, starting_weights(config)[Part.llm])
    chat = ChatFormat.from_dict(load_chat_format(config.stage.finetune.chat_format or config.llm.chat_format))
    chat.check(tokenizer)
    visual = num_visual_tokens(load_shape(config.vision.shape))
    prompts: dict[str, list[Encoded]] = {}  # the controls ask what their task asks
    places, requests, hashes = [], [], []
    for number, sheet in enumerate(sheets):
        task = sheet.task
        if task.name not in prompts:
            texts = [item.question.text for item in task.items]
            prompts[task.name] = [chat.encode_prompt(text, tokenizer, visual) for text in texts]
            lengths = [len(prompt.input_ids) for prompt in prompts[task.name]]
            check_answers(config.llm, lengths, task.max_new_tokens, task.name)
        for at, prompt in enumerate(prompts[task.name]):
            places.append((number, at))
            requests.append(Request(prompt, sheet.images[at], task.max_new_tokens))
            hashes.append({"prompt_sha256": _hash(prompt), "images_sha256": sheet.images_sha256(at)})
    return Asked(sheets, places, requests, hashes)


def _hash(prompt: Encoded) -> str:
    return hashlib.sha256(prompt.input_ids.tobytes() + prompt.visual_mask.tobytes()).hexdigest()


@contextmanager
def answering(
    config: Config, parent: Path, device: str, asked: Asked
) -> Iterator[Callable[[Sequence[int]], Answered]]:
    """A function that answers a chunk. Raises WeightsError; the function NonFiniteError, and SampleError that
    names the item whose image cannot be decoded."""
    with exact_arithmetic(threads_for(config.trainer)):
        model = load_model(config, parent, torch.device(device))
        generator = Generator(model)

        def answer(chunk: Sequence[int]) -> Answered:
            started = time.monotonic()
            answers = generator.answer([asked.requests[i] for i in chunk])
            return Answered([asdict(one) for one in answers], time.monotonic() - started)

        with generation_attention(model.mllm.llm):
            yield answer
