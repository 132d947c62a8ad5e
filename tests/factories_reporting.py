"""Run folders as four finished cells leave them: 2 LLMs x 2 vision encoders, 3 tasks, a blind control."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from morebench.config.compose import build, compose_config, save_config
from morebench.config.schema import Column, Config
from morebench.evaluation.scoring import score_items
from morebench.reporting.results import ReportRow

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "orange": "#ff7f0e", "purple": "#9467bd"}
LLMS = {"gemma2_tiny": "Gemma-2-tiny", "llama_tiny": "Llama-tiny"}
VISIONS = {"clip_tiny": "CLIP-tiny", "siglip_tiny": "SigLIP-tiny"}
SKILL = (0.84, 0.78, 0.71, 0.62)  # share of questions each cell gets right
BLIND_SKILL = 0.3
NUM_IMAGES = 60


@cache
def digits_config() -> Config:
    return compose_config(["llm=gemma2_tiny", "vision=clip_tiny", "recipe=digits", "suite=digits"]).config


def columns() -> list[Column]:
    return digits_config().suite.columns


def four_cells(root: Path, unfinished: Sequence[int] = (), num_images: int = NUM_IMAGES) -> list[ReportRow]:
    """`unfinished`: cells whose evaluate step has not run."""
    records = draw_scenes(root / "data" / "digits", num_images)
    cells = [(llm, vision) for llm in LLMS for vision in VISIONS]
    rows = []
    for number, (llm, vision) in enumerate(cells):
        cell = {"llm": llm, "vision": vision, "resolution": "native", "pretrain_data": "digits"}
        labels = {
            "llm": LLMS[llm],
            "vision": VISIONS[vision],
            "resolution": "native",
            "pretrain_data": "Digits captions",
        }
        runs: dict[str, Path | None] = {}
        for step, start, end in (("pretrain", 5.0, 1.6), ("finetune", 3.0, 0.55)):
            runs[step] = train_folder(
                root / "runs", f"{llm}-{vision}-{step}", start, end + 0.06 * number, number
            )
        runs["evaluate"] = None
        if number not in unfinished:
            folder = root / "runs" / f"{llm}-{vision}-evaluate"
            runs["evaluate"] = evaluate_folder(folder, root / "data", records, SKILL[number], number)
        for name, folder_of_step in runs.items():
            if folder_of_step is not None:
                write_json(folder_of_step / "cell.json", {**cell, "seed": 0})
                write_json(
                    folder_of_step / "parents.json",
                    {"finetune": f"{llm}-{vision}-finetune"} if name == "evaluate" else {},
                )
        rows.append(ReportRow(cell, labels, 0, runs))
    return rows


def draw_scenes(folder: Path, num_images: int) -> dict[str, list[dict[str, Any]]]:
    """Pictures below `folder`/images; the records of each task."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records: dict[str, list[dict[str, Any]]] = {"digits_vqa": [], "digits_pope": [], "digits_mc": []}
    for i in range(num_images):
        name, digit = f"test/{i:04d}.png", int(rng.integers(10))
        colour, other = rng.choice(list(COLOURS), 2, replace=False)
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        scene(digit, colour, (int(rng.integers(4, 30)), int(rng.integers(0, 26)))).save(
            folder / "images" / name
        )
        options = [colour, other, *[c for c in COLOURS if c not in (colour, other)][:2]]
        common = {"image": name}
        records["digits_vqa"] += [
            {**common, "id": f"v{i}a", "question": "Which digit is shown?", "answer": str(digit)},
            {**common, "id": f"v{i}b", "question": "What colour is the digit?", "answer": str(colour)},
        ]
        records["digits_pope"] += [
            {
                **common,
                "id": f"p{i}a",
                "question": f"Is there a {digit} in the image?",
                "answer": "yes",
                "category": "random",
            },
            {
                **common,
                "id": f"p{i}b",
                "question": f"Is there a {(digit + 3) % 10} in the image?",
                "answer": "no",
                "category": "random",
            },
        ]
        records["digits_mc"].append(
            {
                **common,
                "id": f"m{i}",
                "question": "What colour is the digit?",
                "options": options,
                "answer": "0",
            }
        )
    return records


def scene(digit: int, colour: str, place: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (56, 56), "#f3efe6")
    ImageDraw.Draw(image).text(place, str(digit), fill=COLOURS[colour], font_size=26)
    return image


def train_folder(runs: Path, run_id: str, start: float, end: float, seed: int, num_steps: int = 187) -> Path:
    rng = np.random.default_rng(seed)
    folder = runs / run_id
    folder.mkdir(parents=True)
    save_config(digits_config(), folder / "config.yaml")
    lines = []
    for step in range(num_steps):
        loss = end + (start - end) * float(np.exp(-6 * step / num_steps)) + float(rng.normal(0, 0.08))
        lines.append(
            {
                "step": step,
                "loss": loss,
                "lr": 1e-3,
                "tokens": 900,
                "tokens_per_s": 9000 + float(rng.normal(0, 300)),
            }
        )
    write_lines(folder / "metrics.jsonl", lines)
    manifest = {
        "git": {"commit": "0123456789abcdef0123", "diff_sha256": None},
        "seconds": 17.0 + seed,
        "gpu_hours": None,
        "predicted": {"flops": 4e15, "seconds": None, "memory_gib": 2.0, "gpu": None, "assumed": []},
        "training": {"flops": 5e15, "peak_memory_gib": 1.5},
    }
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "DONE", {})
    return folder


def evaluate_folder(
    folder: Path, data: Path, records: dict[str, list[dict[str, Any]]], skill: float, seed: int
) -> Path:
    config = deepcopy(digits_config())
    config.paths.data = str(data)
    for kind in ("predictions", "scores"):
        (folder / kind).mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    rng = np.random.default_rng(100 + seed)
    tasks = {
        task: answer_task(folder, config, task, found, skill, "", rng) for task, found in records.items()
    }
    blind = {
        task: answer_task(folder, config, task, found, BLIND_SKILL, ".blind", rng)
        for task, found in records.items()
    }
    results = {"profile": "paper", "tasks": tasks, "controls": {"blind": blind}, "seconds": 12.3}
    write_json(folder / "results.json", results)
    manifest = {
        "git": {"commit": "0123456789abcdef0123", "diff_sha256": None},
        "gpu_hours": None,
    }
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "DONE", {})
    return folder


def answer_task(
    folder: Path,
    config: Config,
    task: str,
    records: list[dict[str, Any]],
    skill: float,
    suffix: str,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Write the predictions and scores of one task; what results.json says of it."""
    benchmark = build(config.suite.tasks[task].code)
    profile = config.stage.evaluate.profile
    targets = [benchmark.target(record) for record in records]
    wrong = {"digits_vqa": "8", "digits_pope": "no", "digits_mc": "C"}[task]
    flipped = {"yes": "no", "no": "yes"}
    answers = [target if rng.random() < skill else flipped.get(target, wrong) for target in targets]
    items = score_items(benchmark, list(zip(answers, records, strict=True)), profile)
    predictions = [
        {
            "id": record["id"],
            "image": record["image"],
            "question": benchmark.question(record, profile).text,
            "target": target,
            "prediction": answer,
            "prompt_sha256": "0" * 64,
        }
        for record, target, answer in zip(records, targets, answers, strict=True)
    ]
    write_lines(folder / "predictions" / f"{task}{suffix}.jsonl", predictions)
    scores = [{"id": record["id"], **asdict(item)} for record, item in zip(records, items, strict=True)]
    write_lines(folder / "scores" / f"{task}{suffix}.jsonl", scores)
    return {"n": len(items), "metrics": benchmark.aggregate(items, profile)}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
