"""The commands as a user types them, in processes of their own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories_reference import Published

SHORT = ["stage.pretrain.max_steps=2", "stage.finetune.max_steps=2", "tracking=none"]
ONE_CELL = ["experiments=digits", "llm=llama_tiny", "vision=clip_tiny", *SHORT]


def run(verb: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"morebench.{verb}", *arguments],
        env={**os.environ, "MOREBENCH_ROOT": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """A world to break."""
    root = tmp_path / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("runs", "reports"))
    return root


def metrics(root: Path, step: str) -> list[tuple[float, float]]:
    (path,) = root.glob(f"runs/*.{step}.*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def results(root: Path) -> dict[str, object]:
    (path,) = root.glob("runs/*.evaluate.*/results.json")
    found: dict[str, Any] = json.loads(path.read_text())
    for tasks in (found["tasks"], *found["controls"].values()):
        for task in tasks.values():
            del task["seconds"], task["questions_per_s"], task["source"]["folder"]
    del found["seconds"]
    return found


def test_a_matrix_from_nothing_to_a_table(copy: Path) -> None:
    """Four cells, one learning rate of which cannot work: its cells fail, the others get their rows."""
    sweep = ["experiments=digits", "vision=clip_tiny", "llm=llama_tiny", *SHORT, "tracking=mlflow"]
    rates = "stage.finetune.optimizer.lr=1e-3,1e30"
    done = run("train", "-m", *sweep, rates, "stage.finetune.max_steps=3", root=copy)
    assert done.returncode == 4, done.stderr
    assert "Optimizer step" in done.stderr
    assert "4 of 5 runs" not in done.stderr
    assert "3 of 5 runs done" in done.stderr

    again = run("train", "-m", *sweep, "stage.finetune.max_steps=3", root=copy)
    assert again.returncode == 0, again.stderr
    assert "start" not in again.stderr  # nothing was run
    assert not (copy / "outputs").exists()
    assert not (copy / "multirun").exists()

    status = run("status", *sweep, rates, "stage.finetune.max_steps=3", root=copy)
    assert "failed" in status.stdout
    assert "Optimizer step" in status.stdout

    report = run("report", *sweep, "stage.finetune.max_steps=3", root=copy)
    assert report.returncode == 0, report.stderr
    rows = list(csv.DictReader((copy / "reports" / "digits" / "table.csv").open()))
    assert [(row["llm"], row["vision"], row["control"]) for row in rows] == [
        ("llama_tiny", "clip_tiny", ""),
        ("llama_tiny", "clip_tiny", "blind"),
    ]
    assert {name for name in rows[0]} >= {"digits_vqa", "digits_pope", "digits_mc"}
    assert (copy / "reports" / "digits" / "index.html").stat().st_size > 1000

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{copy}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sum("train/loss" in found.data.metrics for found in runs) == 3  # the failed one was mirrored too
    assert sum("eval/digits_vqa/exact_match" in found.data.metrics for found in runs) == 1


def test_killed_and_started_again_is_the_same_as_undisturbed(world: Path, copy: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole process group in the middle of finetune."""
    longer = ["stage.finetune.max_steps=12", "stage.finetune.epochs=4"]
    cell = [*ONE_CELL, *longer, "trainer.checkpoint_every_n_steps=2"]
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(copy, undisturbed)
    assert run("train", "-m", *cell, root=undisturbed).returncode == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "morebench.train", "-m", *cell],
        env={**os.environ, "MOREBENCH_ROOT": str(copy)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    wait_for(
        lambda: any(
            len(p.read_text().splitlines()) >= 5 for p in copy.glob("runs/*.finetune.*/metrics.jsonl")
        )
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = run("train", "-m", *cell, root=copy)
    assert again.returncode == 0, again.stderr
    (folder,) = copy.glob("runs/*.finetune.*")
    assert len((folder / "ATTEMPTS.jsonl").read_text().split()) > 2
    assert metrics(copy, "finetune") == metrics(undisturbed, "finetune")
    assert len(metrics(copy, "finetune")) == 12
    assert results(copy) == results(undisturbed)


def test_a_polite_stop_exits_75_and_continues(copy: Path) -> None:
    cell = [*ONE_CELL, "stage=pretrain", "stage.pretrain.max_steps=null", "stage.pretrain.epochs=40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "morebench.train", "-m", *cell],
        env={**os.environ, "MOREBENCH_ROOT": str(copy)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(p.stat().st_size for p in copy.glob("runs/*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert list(copy.glob("runs/*/checkpoints/step_*"))


def test_two_launches_of_a_run_of_two_ranks_at_the_same_moment(copy: Path) -> None:
    """One trains, the other waits for it; both are content."""
    cell = ["-m", *ONE_CELL, "stage=pretrain", "trainer.devices=2"]
    launches = [
        subprocess.Popen(
            [sys.executable, "-m", "morebench.train", *cell],
            env={**os.environ, "MOREBENCH_ROOT": str(copy)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in launches]
    assert [process.returncode for process in launches] == [0, 0], errors
    (folder,) = copy.glob("runs/*")
    attempts = [json.loads(line) for line in (folder / "ATTEMPTS.jsonl").read_text().splitlines() if line]
    assert len([line for line in attempts if line.get("begun")]) == 1
    assert json.loads((folder / "manifest.json").read_text())["world_size"] == 2
    assert len(metrics(copy, "pretrain")) == 2
    assert "rank 0 | pretrain" in (folder / "log.txt").read_text()


def test_an_interrupt_before_a_command_is_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise KeyboardInterrupt")  # Ctrl-C while the command imports it
    for verb in ("train", "plan"):
        done = subprocess.run(
            [sys.executable, "-m", f"morebench.{verb}"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == -signal.SIGINT
        assert done.stderr == "error: interrupted.\n"


def wait_for(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def edit_records(root: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    path = root / "data" / "digits" / "pretrain.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def first_image(root: Path) -> Path:
    records = json.loads((root / "data" / "digits" / "pretrain.json").read_text())
    return root / "data" / "digits" / "images" / records[0]["image"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def swap_roles(record: dict[str, object]) -> None:
    turns = record["conversations"]
    assert isinstance(turns, list)
    turns[1]["from"] = "human"


def add_image_token(record: dict[str, object]) -> None:
    turns = record["conversations"]
    assert isinstance(turns, list)
    turns[0]["value"] += "\n<image>"


def empty_folder(root: Path) -> None:
    shutil.rmtree(root / "data" / "digits")
    (root / "data" / "digits").mkdir()


BREAKAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no conversations": (
        lambda root: edit_records(root, lambda r: r[3].pop("conversations")),
        ["conversations", "record 3"],
    ),
    "roles": (lambda root: edit_records(root, lambda r: swap_roles(r[2])), ["record 2"]),
    "image count": (
        lambda root: edit_records(root, lambda r: add_image_token(r[1])),
        ["record 1", "<image>"],
    ),
    "missing image": (lambda root: first_image(root).unlink(), ["pretrain_00000"]),
    "truncated image": (lambda root: truncate(first_image(root)), ["pretrain_00000"]),
    "empty folder": (empty_folder, ["digits", "empty"]),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_bad_data_is_named_before_anything_runs(copy: Path, name: str) -> None:
    damage, words = BREAKAGES[name]
    damage(copy)
    done = run("train", "-m", *ONE_CELL, "unchecked_data=check", "max_quarantined=0", root=copy)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(copy.glob("runs/*"))


def test_data_that_changed_since_it_was_checked_is_refused(copy: Path) -> None:
    edit_records(copy, lambda records: records.reverse())
    truncate(first_image(copy))
    train = ["-m", *ONE_CELL, "stage=pretrain"]
    refused = run("train", *train, root=copy)
    assert refused.returncode == 2
    assert "pretrain.json has changed since it was checked" in refused.stderr
    assert "python -m morebench.data check pretrain_data=digits" in refused.stderr
    assert not list(copy.glob("runs/*"))


def test_quarantined_samples_are_counted_and_change_the_run(copy: Path) -> None:
    before = run("plan", *ONE_CELL, root=copy)
    assert before.returncode == 0
    truncate(first_image(copy))
    train = ["-m", *ONE_CELL, "stage=pretrain", "max_quarantined=0.02"]
    refused = run("train", *train, root=copy)
    assert refused.returncode == 2
    assert "1 images are not the files that were checked: pretrain_00000.png" in refused.stderr
    checked = run("data", "check", "pretrain_data=digits", "max_quarantined=0.02", root=copy)
    assert checked.returncode == 0, checked.stderr
    assert "1 image is damaged or cut off (damaged)" in checked.stdout
    plan = run("plan", *ONE_CELL, "max_quarantined=0.02", root=copy)
    assert "1 (1.042%)" in plan.stdout
    assert before.stdout.splitlines()[0] in plan.stdout
    done = run("train", *train, root=copy)
    assert done.returncode == 0, done.stderr
    (path,) = copy.glob("runs/*.pretrain.*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["quarantined"], manifest["data"]["num_samples"]) == (1, 95)
    assert manifest["data"]["quarantined"] == {"damaged": 1}
    assert manifest["planned_data"] == manifest["data"]["content_hash"]
    again = run("data", "check", "pretrain_data=digits", root=copy)
    assert again.returncode == 2
    assert "more than max_quarantined=0.001" in again.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["llm=gema2_tiny"], ["Did you mean gemma2_tiny?"]),
        (["stage.finetune.optimizer.lrr=1"], ["Did you mean stage.finetune.optimizer.lr?"]),
        (["+llm.foo=1"], ["+llm.foo=1"]),
        (["experiments=digits"], ["train -m experiments=digits"]),
        (["paths.runs=/dev/null/runs"], ["/dev/null/runs", "paths.runs="]),
        (["tracking.uri='http://me:hunter2@localhost'"], ["MLFLOW_TRACKING_PASSWORD"]),
        ([], ["microsoft/Phi-4-mini-instruct", "blip_laion_cc_sbu_558k.json"]),
    ],
)
def test_a_users_mistake_is_one_error_and_exit_code_2(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    done = run("train", *overrides, root=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_every_verb_explains_itself() -> None:
    for verb in ("train", "plan", "status", "report", "evaluate", "track", "convert", "chat"):
        done = run(verb, "--help", root=Path.cwd())
        assert done.returncode == 0
        assert "python -m morebench" in done.stdout


def test_golden_cases_replay(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    assert run("evaluate", f"golden={golden}", root=tmp_path).returncode == 0
    cases = json.loads((golden / "gqa.json").read_text())
    cases["cases"][0]["score"] = 0.0
    (tmp_path / "gqa.json").write_text(json.dumps(cases))
    broken = run("evaluate", f"golden={tmp_path}", root=tmp_path)
    assert broken.returncode == 1
    assert "gqa-small-0000" in broken.stdout


@pytest.mark.slow
def test_a_published_checkpoint_is_imported_evaluated_and_finetuned(copy: Path) -> None:
    published = Published("llama_tiny", "clip_tiny")
    published.write(copy / "whole")
    published.write_projector(copy / "projector")
    digits = ["recipe=digits", "suite=digits", "finetune_data=digits", "pretrain_data=digits", "trainer=cpu"]
    cell = ["llm=llama_tiny", "vision=clip_tiny", *digits]
    whole = run("convert", "from=reference", f"path={copy / 'whole'}", *cell, root=copy)
    assert whole.returncode == 0, whole.stderr
    wrong = run(
        "convert", "from=reference", f"path={copy / 'whole'}", *cell[1:], "llm=gemma2_tiny", root=copy
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    evaluated = run("evaluate", f"run={whole.stdout.strip()}", "tracking=none", "trainer=cpu", root=copy)
    assert evaluated.returncode == 0, evaluated.stderr
    assert results(copy)["tasks"]
    projector = run("convert", "from=reference", f"path={copy / 'projector'}", *cell, root=copy)
    parent = f"parent={projector.stdout.strip()}"
    trained = run("train", "stage=finetune", parent, *cell, *SHORT, root=copy)
    assert trained.returncode == 0, trained.stderr
    assert len(metrics(copy, "finetune")) == 2
