"""A finished run of random weights, and its benchmark records where lmms-eval finds them too."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from datasets import Dataset
from factories_evaluation import CLASSES, make_task
from factories_training import make_cell

from morebench.config.compose import save_config
from morebench.config.schema import Config, Part, Suite
from morebench.evaluation.run import evaluate
from morebench.matrix import ledger
from morebench.models.parts import build_mllm, save_parts
from morebench.models.weights import starting_weights

RUN = "toy-finetune-1"
STOCK_TASK = """
task: vqa_stock
dataset_path: parquet
dataset_kwargs: {data_files: {test: PARQUET}}
test_split: test
output_type: generate_until
doc_to_visual: !function stock.visual
doc_to_text: "{{question}}\\nAnswer the question using a single word or phrase."
doc_to_target: answer
generation_kwargs: {max_new_tokens: 5, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""


def make_run(root: Path) -> tuple[Config, Path]:
    """-> config with the tasks vqa, pope and mc, folder of a finetune run. Some answers to vqa are right."""
    config = make_cell(root)
    generator = np.random.default_rng(0)
    tasks = {name: make_task(root / "data" / "toy", name, generator) for name in CLASSES}
    config = replace(config, suite=Suite(label="Toy", tasks=tasks, columns=[]))
    folder = root / "runs" / RUN
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    mllm = build_mllm(config, dict(starting_weights(config)), config.stage.evaluate.precision)
    save_parts(mllm, [Part.projector, *config.stage.finetune.trainable], folder)
    save_config(config, folder / "config.yaml")
    ledger.write_json(folder / "manifest.json", {"run_id": RUN, "step": "finetune"})
    axes = {"llm": "phi4", "vision": "clip", "resolution": "native", "pretrain_data": "lcs", "seed": 0}
    ledger.write_json(folder / "cell.json", axes)
    ledger.mark_done(folder, [*folder.glob("*.safetensors")])
    _take_answers(config, folder, root)
    return config, folder


def _take_answers(config: Config, folder: Path, root: Path) -> None:
    """Random weights are never right by themselves."""
    (root / "first").mkdir()
    evaluate(config, root / "first", folder)
    path = root / "data" / "toy" / "vqa.json"
    records = json.loads(path.read_text())
    lines = (root / "first" / "predictions" / "vqa.jsonl").read_text().splitlines()
    for number, (record, line) in enumerate(zip(records, lines, strict=True)):
        if number % 3 == 0:
            record["answer"] = json.loads(line)["prediction"].strip()
    path.write_text(json.dumps(records))


def write_lmms_tasks(root: Path, config: Config) -> dict[str, str]:
    """-> environment for lmms-eval. Leaves tasks/ for --include_path: the suite, and vqa as others do it.

    `config` is what `make_run` returned.
    """
    suites = root / "conf" / "suite"
    suites.mkdir(parents=True)
    (suites / "toy.yaml").write_text(yaml.safe_dump(asdict(config.suite)))
    tasks = root / "tasks"
    tasks.mkdir()
    for name in CLASSES:
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}_paper\nclass: !function morebench.lmms.task.SuiteTask\n"
            f"suite: toy\nof_suite: {name}\nprofile: paper\n"
        )
    toy = root / "data" / "toy"
    records = json.loads((toy / "vqa.json").read_text())
    columns = {key: [record[key] for record in records] for key in records[0]}
    columns["image"] = [str(toy / "images" / name) for name in columns["image"]]
    Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(root / "vqa.parquet")
    (tasks / "vqa_stock.yaml").write_text(STOCK_TASK.replace("PARQUET", str(root / "vqa.parquet")))
    (tasks / "stock.py").write_text('def visual(doc):\n    return [doc["image"].convert("RGB")]\n')
    return {"MOREBENCH_CONFIG_DIR": str(root / "conf"), "MOREBENCH_DATA": str(root / "data")}
