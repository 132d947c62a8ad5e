"""A cell that starts from a finished run: the run stands for the chain up to its own step."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from factories_reference import Published
from safetensors.torch import load_file

from morebench.config.assemble import assemble
from morebench.config.compose import Composed, compose_config, load_config, parse_overrides
from morebench.config.experiments import expand
from morebench.config.overrides import check
from morebench.config.schema import Step
from morebench.errors import ConfigError, RunError
from morebench.evaluate import composed_for
from morebench.matrix import ledger
from morebench.matrix.cell import Cell, cell_of, cells_of
from morebench.matrix.imported import import_reference
from morebench.matrix.ledger import State
from morebench.matrix.parent import find_run
from morebench.matrix.plan import Plan, make_plan
from morebench.matrix.step import execute, prepare_run
from morebench.prepare import prepare
from morebench.show import print_plan

PARTS = ["llm=llama_tiny", "vision=clip_tiny"]
RECIPE = ["recipe=digits", "suite=digits", "finetune_data=digits", "pretrain_data=digits", "trainer=cpu"]
RECIPE += ["tracking=none", "stage.pretrain.max_steps=2", "stage.finetune.max_steps=2"]


@pytest.fixture(scope="module")
def root(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("parent") / "world"
    shutil.copytree(world, copy, ignore=shutil.ignore_patterns("runs", "reports"))
    return copy


@pytest.fixture(scope="module")
def published(root: Path) -> Published:
    published = Published("llama_tiny", "clip_tiny")
    published.write(root / "published")
    published.write_projector(root / "published_projector")
    return published


@pytest.fixture(scope="module")
def finetuned(root: Path, published: Published) -> Path:
    return import_reference(compose_config(overrides(root)), root / "published").folder


@pytest.fixture(scope="module")
def pretrained(root: Path, published: Published) -> Path:
    return import_reference(compose_config(overrides(root)), root / "published_projector").folder


def overrides(root: Path, *more: str) -> list[str]:
    return [*PARTS, *RECIPE, f"paths.root={root}", f"paths.data={root}/data", *more]


def cell(root: Path, *more: str) -> Cell:
    return cell_of(compose_config(overrides(root, *more)))


def plan_of(*composed: Composed) -> Plan:
    return make_plan(cells_of(composed))


def run_all(plan: Plan) -> list[Path]:
    todo = plan.todo()
    for run in todo:
        prepare_run(run)
        assert execute(run.folder) == (0, "")
    return [run.folder for run in todo]


def test_an_imported_run_is_evaluated(root: Path, finetuned: Path) -> None:
    here = [f"paths.root={root}", f"paths.data={root}/data", "tracking=none", "trainer=cpu"]
    composed = composed_for(finetuned.name, parse_overrides(here))
    plan = plan_of(composed)
    (folder,) = run_all(plan)
    lines = (folder / "predictions" / "digits_vqa.jsonl").read_text().splitlines()
    assert len(lines) == json.loads((folder / "results.json").read_text())["tasks"]["digits_vqa"]["n"] > 0
    assert json.loads((folder / "parents.json").read_text()) == {"finetune": finetuned.name}
    longer = compose_config(overrides(root, "stage=evaluate", f"parent={finetuned.name}"))
    assert plan_of(longer).todo() == [], "the long form names the same run"


def test_evaluating_a_given_run_asks_for_no_training_data(
    root: Path, finetuned: Path, tmp_path: Path
) -> None:
    here = [f"paths.root={root}", f"paths.data={tmp_path}", "tracking=none", "trainer=cpu"]
    composed = composed_for(finetuned.name, parse_overrides([*here, "suite=llava_more_13"]))
    assert composed.config.finetune_data.build is not None, "training would build it here"
    prepare([composed.config])
    assert list(tmp_path.iterdir()) == []
    missing = plan_of(composed).missing_sources
    assert [s for s in missing if "lmms-lab" not in s] == []
    assert len(missing) == 10


def test_finetune_starts_from_an_imported_projector(
    root: Path, pretrained: Path, published: Published
) -> None:
    still = "stage.finetune.optimizer.lr=0"
    plan = plan_of(compose_config(overrides(root, "stage=finetune", f"parent={pretrained}", still)))
    assert [run.step for run in plan.runs.values()] == [Step.pretrain, Step.finetune]
    (folder,) = run_all(plan)
    started = load_file(folder / "projector.safetensors")  # a learning rate of 0 leaves it as it was
    for name, value in published.projector.state_dict().items():
        assert torch.equal(started[name], value)


def test_a_child_reads_the_weights_that_the_import_brought(root: Path, finetuned: Path) -> None:
    child = cell(root, "stage=evaluate", f"parent={finetuned.name}", "seed=5")
    assert Path(str(child.config.llm.weights.folder)) == finetuned / "llm"
    assert Path(str(child.config.vision.weights.folder)) == finetuned / "vision"
    assert child.config.vision.encoder["name"] == "clip_vision_model"
    (run,) = make_plan([child]).todo()
    prepare_run(run)
    assert load_config(run.folder / "config.yaml").llm.weights == child.config.llm.weights
    assert f"../{finetuned.name}/llm" in (run.folder / "config.yaml").read_text()


def test_the_own_previous_step_as_parent_changes_nothing(root: Path) -> None:
    whole = plan_of(compose_config(overrides(root, "stage=finetune")))
    pretrain = next(iter(whole.runs.values()))
    prepare_run(pretrain)
    ledger.mark_done(pretrain.folder, [])
    given = cell(root, "stage=finetune", f"parent={pretrain.run_id}")
    assert make_plan([given]).ids == [dict(whole.ids[0])]


def test_a_parent_changes_the_ids_of_what_follows_and_of_nothing_else(root: Path, pretrained: Path) -> None:
    alone = plan_of(compose_config(overrides(root))).ids[0]
    following = plan_of(compose_config(overrides(root, "stage=finetune", f"parent={pretrained.name}"))).ids[0]
    assert following[Step.pretrain] == pretrained.name
    assert following[Step.finetune] != alone[Step.finetune]


def test_a_parent_in_another_runs_folder(root: Path, pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, tmp_path / pretrained.name)
    shutil.rmtree(root / "elsewhere", ignore_errors=True)
    composed = compose_config(
        overrides(
            root, "stage=finetune", f"parent={tmp_path / pretrained.name}", f"paths.runs={root}/elsewhere"
        )
    )
    (folder,) = run_all(plan_of(composed))
    assert json.loads((folder / "parents.json").read_text())["pretrain"] == str(tmp_path / pretrained.name)
    here = plan_of(compose_config(overrides(root, "stage=finetune", f"parent={pretrained.name}")))
    assert here.ids[0][Step.finetune] == folder.name, "the parent's place is not in the id"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["llm=gemma2_tiny"], ["llm=llama_tiny", "llm=gemma2_tiny"]),
        (["resolution=s2"], ["resolution=native"]),
        (["llm.chat_format=plain"], ["chat format is LLaMA-3.1", "this cell's plain"]),
        (["vision.image.mean=[0,0,0]"], ["vision.image.mean is [0.48145466"]),
        (["resolution.scales=[1,2,3]"], ["resolution.scales is [1], this cell's [1, 2, 3]"]),
        (["projector=linear", "vision=siglip_tiny"], ["projector.depth is 2", "vision=siglip_tiny"]),
        (["pretrain_data=lcs"], ["pretrain_data=digits"]),
        (["stage=full"], ["it is a finetune run", "stage=evaluate"]),
        (["stage.finetune.trainable=[projector]"], ["stage.finetune.trainable is ['llm', 'projector']"]),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(
    changes: list[str], words: list[str], root: Path, finetuned: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        cell(root, "stage=evaluate", f"parent={finetuned.name}", *changes)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) <= len(words)


def test_a_sweep_is_refused_with_every_cell_that_does_not_fit(root: Path, finetuned: Path) -> None:
    sweep = ["stage=evaluate", f"parent={finetuned.name}", "llm=llama_tiny,gemma2_tiny,phi_tiny"]
    texts = [text for text in overrides(root, *sweep) if text != "llm=llama_tiny"]
    with pytest.raises(ConfigError) as caught:
        cells_of(assemble(expand(texts)))
    assert "this one llm=gemma2_tiny" in str(caught.value)
    assert "this one llm=phi_tiny" in str(caught.value)
    seeds = overrides(root, "stage=evaluate", f"parent={finetuned.name}", "seed=0,1")
    assert len(cells_of(assemble(expand(seeds)))) == 2


def test_a_run_that_is_not_there_or_not_done_is_refused(root: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=pretrained.name):
        find_run(pretrained.name[:-2], root / "runs")
    with pytest.raises(RunError, match="no run folder"):
        find_run(str(tmp_path), root / "runs")
    shutil.copytree(pretrained, tmp_path / "torn")
    (tmp_path / "torn" / ledger.DONE).unlink()
    assert ledger.state(tmp_path / "torn") is not State.done
    with pytest.raises(RunError, match="Only a finished run"):
        find_run(str(tmp_path / "torn"), root / "runs")


def test_weights_beside_a_parent_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check([*PARTS, "parent=x", "llm.weights.folder=/y", "vision.weights.revision=z"])
    assert "llm.weights.folder=/y: with parent=ID" in str(caught.value)
    assert "vision.weights.revision=z: with parent=ID" in str(caught.value)
    check([*PARTS, "parent=null", "llm.weights.folder=/y"])


def test_the_plan_says_where_it_starts(root: Path, finetuned: Path) -> None:
    file = StringIO()
    print_plan(make_plan([cell(root, "stage=evaluate", f"parent={finetuned.name}")]), file)
    shown = file.getvalue()
    assert f"Starts from {finetuned}" in shown
    assert str(finetuned / "llm") in shown


def test_evaluating_a_run_lets_nothing_of_the_model_change(
    root: Path, finetuned: Path, pretrained: Path
) -> None:
    place, fixed = f"paths.root={root}", ["llm=phi4", "stage.finetune.max_length=5", "seed=3"]
    with pytest.raises(ConfigError) as caught:
        composed_for(finetuned.name, parse_overrides([place, *fixed]))
    for word in (*fixed, "train stage=evaluate parent=ID"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="is a pretrain run"):
        composed_for(pretrained.name, parse_overrides([place]))
    changed = composed_for(
        finetuned.name,
        parse_overrides([place, "stage.evaluate.profile=lmms_eval_0_7_3", "stage.evaluate.controls=[]"]),
    )
    assert changed.config.stage.evaluate.profile.name == "lmms_eval_0_7_3"
    assert changed.config.stage.evaluate.controls == []
    other = composed_for(finetuned.name, parse_overrides([place, "suite=llava_more_13"]))
    assert "gqa" in other.config.suite.tasks
    with pytest.raises(ConfigError, match="Did you mean digits"):
        composed_for(finetuned.name, parse_overrides([place, "suite=digit"]))
