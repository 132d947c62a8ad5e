"""From the suite to requests, from requests to answers: the same in every process of an evaluate step."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from morebench.config.compose import load_chat_format, load_shape
from morebench.config.schema import Config, Part
from morebench.config.visual import num_visual_tokens
from morebench.data.chat import ChatFormat, Encoded
from morebench.evaluation.chunks import Request
from morebench.evaluation.generate import Generator
from morebench.evaluation.model import LoadedModel, load_model, question_prompt
from morebench.evaluation.sheets import Sheet
from morebench.models.llm import load_tokenizer
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


class Job(NamedTuple):
    requests: Sequence[int]  # answered together
    share: bool = True  # what is equal of their prompts is computed once


@dataclass(frozen=True)
class Answered:
    """A job's. `answers`: fields of an Answer, in order."""

    answers: Sequence[dict[str, Any]]
    seconds: float  # that one device took
    halved: int  # times that a part of it did not fit the device's memory as a whole


def ask(config: Config, sheets: Sequence[Sheet]) -> Asked:
    """Raises WeightsError without a tokenizer, ConfigError if it cannot write the chat format."""
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
            prompts[task.name] = [question_prompt(text, chat, tokenizer, visual) for text in texts]
        for at, prompt in enumerate(prompts[task.name]):
            places.append((number, at))
            requests.append(Request(prompt, sheet.images[at], task.max_new_tokens))
            hashes.append({"prompt_sha256": _hash(prompt), "images_sha256": sheet.images_sha256(at)})
    return Asked(sheets, places, requests, hashes)


def _hash(prompt: Encoded) -> str:
    return hashlib.sha256(prompt.input_ids.tobytes() + prompt.visual_mask.tobytes()).hexdigest()


class Answering:
    """A loaded model that answers."""

    def __init__(self, config: Config, model: LoadedModel, asked: Asked) -> None:
        # Positions of the LLM's cache that this device has room for.
        self.cache_positions = model.cache_positions(config.trainer.evaluate_cache_gib)
        self._asked, self._generator = asked, Generator(model)

    def answer(self, job: Job) -> Answered:
        """Raises NonFiniteError, and SampleError that names the item whose image cannot be decoded."""
        started, halved = time.monotonic(), self._generator.out_of_memory
        requests = [self._asked.requests[i] for i in job.requests]
        answers = [asdict(answer) for answer in self._generator.answer(requests, job.share)]
        return Answered(answers, time.monotonic() - started, self._generator.out_of_memory - halved)


@contextmanager
def answering(config: Config, parent: Path, device: str, asked: Asked) -> Iterator[Answering]:
    """`parent`: the finetune run. Raises WeightsError."""
    with exact_arithmetic(threads_for(config.trainer)):
        yield Answering(config, load_model(config, parent, torch.device(device)), asked)
