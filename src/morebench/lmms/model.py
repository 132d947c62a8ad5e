"""A finished finetune run as a model of lmms-eval."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image

from morebench.config.compose import parse_overrides
from morebench.data.images import to_rgb
from morebench.errors import ConfigError, DataError
from morebench.evaluate import composed_for
from morebench.evaluation.generate import Answer, Generator, Request, generation_attention, plan_chunks
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import load_model
from morebench.lmms.asking import answer_limit, check_generation, place_images
from morebench.lmms.docs import Docs, told
from morebench.matrix.parent import find_run
from morebench.models.rope import check_answers
from morebench.progress import track
from morebench.training.choices import threads_for
from morebench.training.strategy import exact_arithmetic

_SHORT = {"runs": "paths.runs", "profile": "stage.evaluate.profile"}  # of --model_args


class Morebench(lmms):
    """--model_args run=ID and, as for `python -m morebench.evaluate run=ID`, overrides."""

    is_simple = True  # the text as it is: our chat formats and image tokens, not lmms-eval's messages

    def __init__(
        self,
        run: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        with told():
            if run is None:
                raise ConfigError("expected --model_args run=ID, the id or the folder of a finetune run.")
            if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise ConfigError(f"--batch_size must be a number from 1 on, found {batch_size}.")
            texts = [f"{_SHORT.get(key, key)}={_written(value)}" for key, value in overrides.items()]
            config = composed_for(str(run), parse_overrides(texts)).config
            parent = find_run(str(run), Path(config.paths.runs))
            self._device = _device(device, config.trainer.accelerator)
            self._threads = threads_for(config.trainer)
            self._profile = config.stage.evaluate.profile
            self._model = replace(load_model(config, parent.folder, self._device), batch_size=int(batch_size))
            logger.info(f"{parent.run_id} on {self._device}, profile {self._profile.name}")

    @property
    def device(self) -> torch.device:
        return self._device

    def clean(self) -> None:
        del self._model  # a dataclass, where lmms-eval looks for modules
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """In the order of `requests`."""
        with told():
            check_generation((task, generation) for _, generation, _, _, task, _ in _arguments(requests))
            asked = self._requests(requests)
            answers = self._answer(asked)
        cut, near_ties = sum(not each.ended for each in answers), sum(each.near_ties for each in answers)
        logger.info(f"{len(answers)} answers, {cut} cut at their limit, {near_ties} near ties")
        return [
            GenerationResult(answer.text, TokenCounts(len(request.prompt.input_ids), answer.num_tokens))
            for request, answer in zip(asked, answers, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("morebench answers by generation; no task of its suites needs likelihoods.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("morebench answers one question at a time; `chat` is for several turns.")

    def _requests(self, requests: Sequence[Instance]) -> list[Request]:
        asked: list[Request] = []
        lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
        surplus: Counter[str] = Counter()
        for text, generation, doc_to_visual, doc_id, task, split in track(
            list(_arguments(requests)), "images"
        ):
            images = _images(self.task_dict[task][split], doc_to_visual, doc_id, f"{task} {doc_id}")
            text, shown = place_images(text, len(images), self._profile, f"{task} {doc_id}")
            surplus[task] += shown < len(images)
            request = Request(self._model.prompt(text), images[:shown], answer_limit(generation))
            lengths[task, request.max_new_tokens].append(len(request.prompt.input_ids))
            asked.append(request)
        for (task, limit), of_task in lengths.items():
            check_answers(self._model.llm, of_task, limit, task)
        for task, count in (+surplus).items():
            logger.warning(
                f"{task}: {count} questions show the LLM their first images only, as many as profile "
                f"{self._profile.name} puts image tokens into their text."
            )
        return asked

    def _answer(self, asked: Sequence[Request]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        with exact_arithmetic(self._threads), generation_attention(self._model.mllm.llm):
            generator = Generator(self._model)
            for chunk in track(plan_chunks(asked, self._model.batch_size), "answers"):
                answers |= zip(chunk, generator.answer([asked[i] for i in chunk]), strict=True)
        return [answers[i] for i in range(len(asked))]


def _arguments(requests: Sequence[Instance]) -> Iterator[tuple[str, dict[str, Any], Any, int, str, str]]:
    return (request.args for request in requests)


def _images(docs: Any, doc_to_visual: Any, doc_id: int, where: str) -> tuple[StoredImage, ...]:
    if isinstance(docs, Docs):
        return docs[doc_id].item.images

    def load(number: int) -> Image.Image:
        return to_rgb(doc_to_visual(docs[doc_id])[number])

    visuals = doc_to_visual(docs[doc_id]) or []
    if others := sorted({type(each).__name__ for each in visuals if not isinstance(each, Image.Image)}):
        raise DataError(f"{where}: morebench sees images only, found {', '.join(others)}.")
    # Keys of the content: questions about one image share its prefix, whichever rows they come from.
    return tuple(
        StoredImage(_key(to_rgb(image)), f"{where} image {number}", partial(load, number))
        for number, image in enumerate(visuals)
    )


def _key(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _device(name: str | None, accelerator: str) -> torch.device:
    """Of each process its own GPU, unless one is named."""
    if name is None:
        use_gpu = accelerator != "cpu" and torch.cuda.is_available()
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if use_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected cuda, cuda:0, ... or cpu.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: {torch.cuda.device_count()} GPUs are here.")
    return device


def _written(value: Any) -> str:
    """As an override: lmms-eval has made numbers and truth values of some texts."""
    return str(value).lower() if isinstance(value, bool) else str(value)
