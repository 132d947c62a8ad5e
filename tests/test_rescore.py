"""Scores made again from predictions: what it changes, what it refuses, and that no model is needed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories_reference import Published

from morebench.config.compose import compose_config, parse_overrides
from morebench.errors import ConfigError, DataError, RunError
from morebench.evaluate import command, composed_for
from morebench.evaluation.predictions import read_predictions
from morebench.matrix import ledger
from morebench.matrix.cell import cells_of
from morebench.matrix.imported import import_reference
from morebench.matrix.plan import make_plan
from morebench.matrix.step import execute, prepare_run
from morebench.reporting.results import scored_items

CELL = ["llm=llama_tiny", "vision=clip_tiny", "recipe=digits", "suite=digits", "finetune_data=digits"]
CELL += ["pretrain_data=digits", "trainer=cpu", "tracking=none"]


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finetune run and its evaluate run."""
    root = tmp_path_factory.mktemp("rescore") / "world"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("runs", "reports"))
    published = Published("llama_tiny", "clip_tiny")
    published.write(root / "published")
    finetuned = import_reference(compose_config([*CELL, *here(root)]), root / "published").folder
    composed = composed_for(finetuned.name, parse_overrides([*here(root), "trainer=cpu", "tracking=none"]))
    for run in make_plan(cells_of([composed])).todo():
        prepare_run(run)
        assert execute(run.folder) == (0, "")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Its runs may be changed."""
    shutil.copytree(made, tmp_path / "world")
    return tmp_path / "world"


def here(root: Path) -> list[str]:
    return [f"paths.root={root}", f"paths.data={root}/data"]


def runs(root: Path, step: str) -> list[Path]:
    return sorted(root.glob(f"runs/*.{step}.*"))


def rescore(root: Path, run: Path, *more: str) -> int:
    return command([f"run={run.name}", "rescore=true", "tracking=none", "trainer=cpu", *here(root), *more])


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for tasks in (found["tasks"], *found["controls"].values()):
        for result in tasks.values():
            del result["source"]["folder"]  # the world was copied
    return found


def change_predictions(
    folder: Path, change: Callable[[dict[str, Any]], Any], task: str = "digits_pope"
) -> None:
    path = folder / "predictions" / f"{task}.jsonl"
    lines = read_predictions(path)
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("step", ["finetune", "evaluate"])
def test_the_same_config_is_scored_in_place(root: Path, step: str) -> None:
    (evaluated,) = runs(root, "evaluate")
    before = results(evaluated)
    change_predictions(evaluated, lambda line: line.update(prediction="yes"))
    assert rescore(root, runs(root, step)[0]) == 0
    assert runs(root, "evaluate") == [evaluated]
    assert ledger.is_done(evaluated)
    after = results(evaluated)
    assert {item.score for _, item in scored_items(evaluated, "digits_pope")} == {0.0, 1.0}
    assert after["tasks"]["digits_pope"]["metrics"]["recall"] == 1.0
    same = ("digits_vqa", "digits_mc")
    assert [after["tasks"][task] for task in same] == [before["tasks"][task] for task in same]
    assert after["seconds"] == before["seconds"], "the price of the answers"
    (note,) = json.loads((evaluated / "manifest.json").read_text())["rescored"]
    assert set(note) == {"at", "profile", "git"}


def test_no_model_is_read_and_torch_is_not_imported(root: Path) -> None:
    (evaluated,) = runs(root, "evaluate")
    before = results(evaluated)
    for folder in (root / "weights", *runs(root, "finetune")):
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    arguments = [f"run={evaluated.name}", "rescore=true", "tracking=none", *here(root)]
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"from morebench.evaluate import command; raise SystemExit(command({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits_vqa" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith(("More", "llama")))
    assert results(evaluated) == before


def test_another_recipe_is_another_run_with_the_predictions_copied(root: Path) -> None:
    """Without a control the same questions are asked."""
    (evaluated,) = runs(root, "evaluate")
    whole = {path: path.read_bytes() for path in evaluated.rglob("*.json*")}
    assert rescore(root, evaluated, "stage.evaluate.controls=[]") == 0
    (other,) = set(runs(root, "evaluate")) - {evaluated}
    assert {path: path.read_bytes() for path in evaluated.rglob("*.json*")} == whole
    assert ledger.is_done(other)
    assert results(other)["tasks"] == results(evaluated)["tasks"]
    assert results(other)["controls"] == {}
    assert json.loads((other / "manifest.json").read_text())["rescored_from"] == evaluated.name
    asked = [*here(root), "trainer=cpu", "tracking=none", "stage.evaluate.controls=[]"]
    composed = composed_for(runs(root, "finetune")[0].name, parse_overrides(asked))
    assert make_plan(cells_of([composed])).todo() == [], "it is the run that generating would make"


def test_what_must_be_generated_again_is_listed_at_once(root: Path) -> None:
    (evaluated,) = runs(root, "evaluate")
    before = results(evaluated)
    change_predictions(evaluated, lambda line: line.update(question="another?"), "digits_vqa")
    change_predictions(evaluated, lambda line: line.update(images_sha256="0"), "digits_mc")
    (evaluated / "predictions" / "digits_pope.blind.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        rescore(
            root, evaluated, "suite.tasks.digits_pope.max_new_tokens.paper=5", "stage.evaluate.precision=bf16"
        )
    for sentence in (
        "everything: generated with stage.evaluate.precision=fp32, asked for is bf16.",
        "digits_vqa: 24 of 24 items were asked another question, first ",
        "digits_mc: 24 of 24 items were asked about another image, first ",
        "digits_pope: generated with max_new_tokens=128, asked for is 5.",
        "digits_pope blind: has no predictions.",
    ):
        assert sentence in str(caught.value)
    assert runs(root, "evaluate") == [evaluated]
    assert results(evaluated) == before
    assert (evaluated / "DONE").is_file()


def test_another_run_of_older_code_is_refused(root: Path) -> None:
    (evaluated,) = runs(root, "evaluate")
    manifest = json.loads((evaluated / "manifest.json").read_text())
    (evaluated / "manifest.json").write_text(json.dumps({**manifest, "numerics": 3}))
    with pytest.raises(ConfigError, match="was answered under numerics 3"):
        rescore(root, evaluated, "stage.evaluate.controls=[]")
    assert rescore(root, evaluated) == 0


def test_without_an_evaluate_run_there_is_nothing_to_score(root: Path) -> None:
    (evaluated,), (finetuned,) = runs(root, "evaluate"), runs(root, "finetune")
    shutil.rmtree(evaluated)
    with pytest.raises(RunError, match="is a finetune run without an evaluate run"):
        rescore(root, finetuned)
    with pytest.raises(ConfigError, match="expected run=ID rescore=true"):
        command(["run=x", "rescore=maybe"])
