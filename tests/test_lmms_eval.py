"""lmms-eval's own command, in its own environment (`make lmms`), against our evaluate step."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from factories_evaluation import CLASSES, NUM_ITEMS
from factories_lmms import RUN, make_run, write_lmms_tasks

from morebench.config.compose import ROOT
from morebench.evaluation.run import evaluate

PYTHON = ROOT / ".venv-lmms" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: `make lmms` installs it"),
]


class Outcome(NamedTuple):
    evaluated: Path  # what our evaluate step left
    metrics: dict[str, dict[str, float]]  # of lmms-eval, by task
    predictions: dict[str, list[str]]


def lmms_eval(root: Path, environment: dict[str, str], model_args: str) -> subprocess.CompletedProcess[str]:
    tasks = ",".join([*(f"{name}_paper" for name in CLASSES), "vqa_stock"])
    arguments = ["--model", "morebench", "--model_args", f"{model_args},paths.root={root},trainer=cpu"]
    arguments += ["--include_path", str(root / "tasks"), "--tasks", tasks, "--batch_size", "8"]
    arguments += ["--log_samples", "--output_path", str(root / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "WANDB_MODE": "disabled"}
    return subprocess.run(
        [PYTHON, "-m", "lmms_eval", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", **offline, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = tmp_path_factory.mktemp("lmms")
    config, parent = make_run(root)
    environment = write_lmms_tasks(root, config)
    evaluated = root / "evaluated"
    evaluated.mkdir()
    evaluate(config, evaluated, parent)
    run = lmms_eval(root, environment, f"run={RUN}")
    written = sorted((root / "out").rglob("*_results.json"))
    assert len(written) == 1, run.stdout + run.stderr
    results: dict[str, dict[str, Any]] = json.loads(written[0].read_text())["results"]
    return Outcome(
        evaluated,
        {
            task: {
                key.removesuffix(",none"): value for key, value in found.items() if isinstance(value, float)
            }
            for task, found in results.items()
        },
        {task: predictions_of(root / "out", task) for task in results},
    )


def predictions_of(folder: Path, task: str) -> list[str]:
    (path,) = folder.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


@pytest.mark.parametrize("name", CLASSES)
def test_our_tasks_give_the_answers_and_metrics_of_the_evaluate_step(outcome: Outcome, name: str) -> None:
    lines = (outcome.evaluated / "predictions" / f"{name}.jsonl").read_text().splitlines()
    assert outcome.predictions[f"{name}_paper"] == [json.loads(line)["prediction"] for line in lines]
    results = json.loads((outcome.evaluated / "results.json").read_text())
    assert outcome.metrics[f"{name}_paper"] == results["tasks"][name]["metrics"]


def test_a_task_that_is_not_ours_gives_the_same_where_it_asks_the_same(outcome: Outcome) -> None:
    assert len(set(outcome.predictions["vqa_stock"])) >= NUM_ITEMS / 4
    assert outcome.predictions["vqa_stock"] == outcome.predictions["vqa_paper"]
    score = outcome.metrics["vqa_stock"]["exact_match"]
    assert score == outcome.metrics["vqa_paper"]["exact_match"] > 0.3
