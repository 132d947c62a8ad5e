"""Evaluate one finished cell: generate once per item and control, score apart."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageStat
from torch import Tensor

from morebench.config.compose import ROOT, load_chat_format
from morebench.config.schema import LLM, Config, Part, Profile
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.image_processor import ImageProcessor
from morebench.data.images import load_image
from morebench.errors import ConfigError
from morebench.evaluation.generate import generate, generation_attention, length_batches
from morebench.evaluation.predictions import PredictionsFile, write_lines
from morebench.evaluation.records import Item, OpenTask, open_task
from morebench.evaluation.scoring import score_items
from morebench.models.llm import load_tokenizer
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, load_part
from morebench.models.rope import check_answers
from morebench.models.weights import starting_weights
from morebench.progress import track
from morebench.training.choices import threads_for
from morebench.training.fence import Fence, unfenced
from morebench.training.files import update_manifest, write_atomically
from morebench.training.provenance import provenance
from morebench.training.strategy import exact_arithmetic

BLIND = "blind"


@dataclass(frozen=True)
class _Model:
    mllm: MLLM
    tokenizer: Any
    chat: ChatFormat
    processor: ImageProcessor
    batch_size: int
    llm: LLM

    @property
    def device(self) -> torch.device:
        return self.mllm.llm.device

    @torch.inference_mode()
    def encode(self, files: Sequence[Path], control: str | None) -> dict[Path, Tensor]:
        """Visual tokens of each image, `[V, D]`, on the CPU."""
        encoded: dict[Path, Tensor] = {}
        unique = list(dict.fromkeys(files))
        for start in range(0, len(unique), self.batch_size):
            chunk = unique[start : start + self.batch_size]
            images = [seen(load_image(path), control) for path in chunk]
            pixels = torch.from_numpy(np.stack([self.processor(image) for image in images]))
            visual_IVD = self.mllm.encode_images(pixels.to(self.device)).cpu()
            encoded |= dict(zip(chunk, visual_IVD, strict=True))
        return encoded


def evaluate(config: Config, folder: Path, parent: Path, fence: Fence = unfenced) -> None:
    """Answer and score every task of the suite, and again under every control.

    `parent` is the finetune run. Leaves predictions/, scores/ and results.json in `folder`. Raises DataError
    for bad records before anything is loaded, and what `fence` does.
    """
    started = time.monotonic()
    recipe = config.stage.evaluate
    if unknown := set(recipe.controls) - {BLIND}:
        raise ConfigError(f"stage.evaluate.controls: there is no {sorted(unknown)}. There is: {BLIND}.")
    tasks = [open_task(name, task, config.paths, recipe.profile) for name, task in config.suite.tasks.items()]
    with exact_arithmetic(threads_for(config.trainer)):
        model = _load(config, parent)
        results: dict[str | None, dict[str, Any]] = {None: {}, **{control: {} for control in recipe.controls}}
        with generation_attention(model.mllm.llm):
            for task in tasks:
                for control, found in results.items():
                    lines = _answer(model, task, control, folder, fence)
                    fence()
                    found[task.name] = _score(task, lines, recipe.profile, control, folder)
    seconds = time.monotonic() - started
    content = {
        "profile": recipe.profile.name,
        "tasks": results.pop(None),
        "controls": results,
        "seconds": round(seconds, 3),
    }
    gpus = 1 if model.device.type == "cuda" else 0
    facts = {"seconds": round(seconds, 3), "gpu_hours": seconds * gpus / 3600, **provenance(ROOT)}
    fence()
    update_manifest(folder, {**facts, "profile": recipe.profile.name})
    write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")


def seen(image: Image.Image, control: str | None) -> Image.Image:
    """What the model is shown: the image, or under `blind` its mean colour in its size."""
    if control is None:
        return image
    mean = tuple(round(channel) for channel in ImageStat.Stat(image).mean)
    return Image.new("RGB", image.size, mean)


def _load(config: Config, parent: Path) -> _Model:
    weights = starting_weights(config)
    tokenizer = load_tokenizer(config.llm, weights[Part.llm])
    chat = ChatFormat.from_dict(load_chat_format(config.stage.finetune.chat_format or config.llm.chat_format))
    chat.check(tokenizer)
    # Built from the starting folders first: their config.json has more fields than the shape.
    mllm = build_mllm(config, weights, config.stage.evaluate.precision)
    for part in dict.fromkeys([Part.projector, *config.stage.finetune.trainable]):
        load_part(mllm, part, parent / f"{part.name}.safetensors")
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    mllm.eval().to("cuda" if on_gpu else "cpu")
    return _Model(
        mllm,
        tokenizer,
        chat,
        ImageProcessor(
            config.vision.image,
            mllm.vision.image_size,
            config.stage.evaluate.image_aspect_ratio,
            max(config.resolution.scales),
        ),
        config.trainer.evaluate_batch_size,
        config.llm,
    )


def _answer(
    model: _Model, task: OpenTask, control: str | None, folder: Path, fence: Fence
) -> list[dict[str, Any]]:
    """Prediction lines of every item, in record order."""
    prompts = [
        model.chat.encode_prompt(item.question.text, model.tokenizer, model.mllm.vision.num_visual_tokens)
        for item in task.items
    ]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    check_answers(model.llm, lengths, task.max_new_tokens, task.name)
    hashes = {item.index: _prompt_hash(prompt) for item, prompt in zip(task.items, prompts, strict=True)}
    with PredictionsFile(folder / "predictions" / _file(task.name, control), hashes) as file:
        # The batches of an uninterrupted run, whatever is done already: so a resume computes the same bits.
        batches = [[task.items[i] for i in batch] for batch in length_batches(lengths, model.batch_size)]
        batches = [batch for batch in batches if any(item.index not in file.lines for item in batch)]
        visual = model.encode(
            [image for batch in batches for item in batch for image in item.images], control
        )
        ends = model.chat.end_token_ids(model.tokenizer)
        for batch in track(batches, f"{task.name}{f' {control}' if control else ''}"):
            answers = generate(
                model.mllm,
                model.tokenizer,
                ends,
                [prompts[item.index] for item in batch],
                [_stacked(visual, item, model) for item in batch],
                task.max_new_tokens,
            )
            fence()
            file.append(
                _line(task, item, hashes[item.index], asdict(answer))
                for item, answer in zip(batch, answers, strict=True)
                if item.index not in file.lines
            )
        fence()
        return file.finish()


def _stacked(visual: Mapping[Path, Tensor], item: Item, model: _Model) -> Tensor:
    if not item.images:
        return torch.zeros(0, model.mllm.vision.num_visual_tokens, model.mllm.llm.config.hidden_size)
    return torch.stack([visual[image] for image in item.images])


def _prompt_hash(prompt: Encoded) -> str:
    return hashlib.sha256(prompt.input_ids.tobytes() + prompt.visual_mask.tobytes()).hexdigest()


def _line(task: OpenTask, item: Item, prompt_hash: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": item.index,
        "id": item.id,
        "image": ", ".join(str(item.record[field]) for field in item.question.images),
        "question": item.question.text,
        "target": task.benchmark.target(item.record),
        "prediction": answer.pop("text"),
        "prompt_sha256": prompt_hash,
        **answer,
    }


def _score(
    task: OpenTask, lines: Sequence[dict[str, Any]], profile: Profile, control: str | None, folder: Path
) -> dict[str, Any]:
    answered = [(line["prediction"], item.record) for line, item in zip(lines, task.items, strict=True)]
    scored = score_items(task.benchmark, answered, profile)
    (folder / "scores").mkdir(exist_ok=True)
    write_lines(
        folder / "scores" / _file(task.name, control),
        ({"id": item.id, **asdict(score)} for item, score in zip(task.items, scored, strict=True)),
    )
    return {
        "n": len(scored),
        "metrics": task.benchmark.aggregate(scored, profile),
        "near_ties": sum(line["near_ties"] for line in lines),
        "unreadable_tokens": sum(line["unreadable_tokens"] for line in lines),
        "cut": sum(not line["ended"] for line in lines),
    }


def _file(task: str, control: str | None) -> str:
    return f"{task}.{control}.jsonl" if control else f"{task}.jsonl"
