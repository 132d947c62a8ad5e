"""Requests of lmms-eval, answered by a finished run."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from morebench.config.compose import parse_overrides
from morebench.data.images import to_rgb
from morebench.errors import ConfigError, DataError
from morebench.evaluate import composed_for
from morebench.evaluation.generate import Answer, Generator, Request, plan_chunks
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import load_model
from morebench.lmms.docs import Docs
from morebench.lmms.requests import answer_limit, check_generation, place_images
from morebench.matrix.parent import find_run
from morebench.progress import track
from morebench.training.choices import threads_for
from morebench.training.strategy import exact_arithmetic

_SHORT = {"runs": "paths.runs", "profile": "stage.evaluate.profile"}  # of --model_args

_Visuals = Callable[[Any], Sequence[Any] | None]


class Asked(NamedTuple):
    """The arguments of a request to a model that lmms-eval calls simple."""

    text: str
    generation: Mapping[str, Any]
    doc_to_visual: _Visuals
    doc_id: int
    task: str
    split: str


class AskedRun:
    def __init__(
        self, run: str | None, device: str | None, batch_size: int | str, overrides: Mapping[str, Any]
    ) -> None:
        """`overrides` as for `python -m morebench.evaluate run=ID`. Raises MorebenchError."""
        if run is None:
            raise ConfigError("expected --model_args run=ID, the id or the folder of a finetune run.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size must be a number from 1 on, found {batch_size}.")
        texts = [f"{_SHORT.get(key, key)}={_written(value)}" for key, value in overrides.items()]
        config = composed_for(run, parse_overrides(texts)).config
        parent = find_run(run, Path(config.paths.runs))
        self.device = _device(device, config.trainer.accelerator)
        self._threads = threads_for(config.trainer)
        self._profile = config.stage.evaluate.profile
        self._model = replace(load_model(config, parent.folder, self.device), batch_size=int(batch_size))
        _say(f"{parent.run_id} on {self.device}, profile {self._profile.name}")

    def answer(
        self, all_asked: Sequence[Asked], docs: Mapping[str, Mapping[str, Any]]
    ) -> list[tuple[Request, Answer]]:
        """In the order of `all_asked`. `docs`: task -> split -> rows. Raises MorebenchError."""
        check_generation((asked.task, asked.generation) for asked in all_asked)
        surplus: Counter[str] = Counter()
        requests = []
        for asked in track(all_asked, "questions"):
            request, left = self._request(asked, docs[asked.task][asked.split])
            requests.append(request)
            surplus[asked.task] += left > 0
        for task, count in (+surplus).items():
            _say(
                f"WARNING: {task}: {count} questions show their first images only: profile "
                f"{self._profile.name} puts fewer image tokens into their text than they have images."
            )
        answers: dict[int, Answer] = {}
        with exact_arithmetic(self._threads):
            generator = Generator(self._model)
            for chunk in track(plan_chunks(requests, self._model.batch_size), "chunks of answers"):
                answers |= zip(chunk, generator.answer([requests[i] for i in chunk]), strict=True)
        cut = sum(not answer.ended for answer in answers.values())
        near_ties = sum(answer.near_ties for answer in answers.values())
        _say(f"{len(answers)} answers, {cut} cut at their limit, {near_ties} near ties")
        return [(request, answers[i]) for i, request in enumerate(requests)]

    def _request(self, asked: Asked, rows: Any) -> tuple[Request, int]:
        """-> request, how many of its images it does not show."""
        where = f"{asked.task} {asked.doc_id}"
        images = _images(asked, rows, where)
        text, shown = place_images(asked.text, len(images), self._profile, where)
        request = Request(self._model.prompt(text), images[:shown], answer_limit(asked.generation))
        return request, len(images) - shown


def _images(asked: Asked, rows: Any, where: str) -> tuple[StoredImage, ...]:
    if isinstance(rows, Docs):
        return rows[asked.doc_id].item.images

    def load(number: int) -> Image.Image:
        return to_rgb((asked.doc_to_visual(rows[asked.doc_id]) or [])[number])

    visuals = asked.doc_to_visual(rows[asked.doc_id]) or []
    if others := sorted({type(each).__name__ for each in visuals if not isinstance(each, Image.Image)}):
        raise DataError(f"{where}: expected images, found {', '.join(others)}. morebench sees images only.")
    # Keys of the content: questions about one image share its prefix, whichever rows they come from.
    return tuple(
        StoredImage(_key(to_rgb(image)), f"{where} image {number}", partial(load, number))
        for number, image in enumerate(visuals)
    )


def _key(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _device(name: str | None, accelerator: str) -> torch.device:
    """Of each process its own GPU, unless one is named. Raises ConfigError."""
    if name is None:
        use_gpu = accelerator != "cpu" and torch.cuda.is_available()
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if use_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected cuda, cuda:0, ... or cpu.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here.")
    return device


def _written(value: Any) -> str:
    """As an override: lmms-eval has made numbers and truth values of some texts."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _say(text: str) -> None:
    print(f"morebench: {text}", file=sys.stderr, flush=True)
