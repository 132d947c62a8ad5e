"""Evaluate one finished cell: generate once per item and control, score apart."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from morebench.config.compose import ROOT
from morebench.config.schema import Config, Profile
from morebench.data.chat import Encoded
from morebench.evaluation.controls import blind, check_controls
from morebench.evaluation.generate import Generator, Request, plan_chunks
from morebench.evaluation.items import Item, OpenTask
from morebench.evaluation.model import LoadedModel, load_model
from morebench.evaluation.predictions import PredictionsFile, write_lines
from morebench.evaluation.records import open_task
from morebench.evaluation.scoring import score_items
from morebench.progress import track
from morebench.training.choices import threads_for
from morebench.training.fence import Fence, unfenced
from morebench.training.files import update_manifest, write_atomically
from morebench.training.provenance import provenance
from morebench.training.strategy import exact_arithmetic


def evaluate(config: Config, folder: Path, parent: Path, fence: Fence = unfenced) -> None:
    """Answer and score every task of the suite, and again under every control.

    `parent` is the finetune run. Leaves predictions/, scores/ and results.json in `folder`. Raises DataError
    for bad records before anything is loaded, and what `fence` does.
    """
    started = time.monotonic()
    recipe = config.stage.evaluate
    check_controls(recipe.controls)
    tasks = [open_task(name, task, config.paths, recipe.profile) for name, task in config.suite.tasks.items()]
    with exact_arithmetic(threads_for(config.trainer)):
        on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        model = load_model(config, parent, torch.device("cuda" if on_gpu else "cpu"))
        results: dict[str | None, dict[str, Any]] = {None: {}, **{control: {} for control in recipe.controls}}
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


def _answer(
    model: LoadedModel, task: OpenTask, control: str | None, folder: Path, fence: Fence
) -> list[dict[str, Any]]:
    """Prediction lines of every item, in record order."""
    requests = [_request(model, task, item, control) for item in task.items]
    hashes = {item.index: _prompt_hash(r.prompt) for item, r in zip(task.items, requests, strict=True)}
    with PredictionsFile(folder / "predictions" / _file(task.name, control), hashes) as file:
        # The chunks of an uninterrupted run, whatever is done already: so a resume computes the same bits.
        chunks = [
            chunk
            for chunk in plan_chunks(requests, model.batch_size)
            if any(task.items[i].index not in file.lines for i in chunk)
        ]
        generator = Generator(model)
        for chunk in track(chunks, f"{task.name}{f' {control}' if control else ''}"):
            answers = generator.answer([requests[i] for i in chunk])
            fence()
            file.append(
                _line(task, task.items[i], hashes[task.items[i].index], asdict(answer))
                for i, answer in zip(chunk, answers, strict=True)
                if task.items[i].index not in file.lines
            )
        fence()
        return file.finish()


def _request(model: LoadedModel, task: OpenTask, item: Item, control: str | None) -> Request:
    images = item.images if control is None else tuple(blind(image) for image in item.images)
    return Request(model.prompt(item.question.text), images, task.max_new_tokens)


def _prompt_hash(prompt: Encoded) -> str:
    return hashlib.sha256(prompt.input_ids.tobytes() + prompt.visual_mask.tobytes()).hexdigest()


def _line(task: OpenTask, item: Item, prompt_hash: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": item.index,
        "id": item.id,
        "image": ", ".join(image.name for image in item.images),
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
