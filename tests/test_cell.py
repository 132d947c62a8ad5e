"""A run id changes with everything that can change the weights, and with nothing else."""

import json
from dataclasses import replace

import pytest

from morebench.config.assemble import assemble
from morebench.config.compose import compose_config
from morebench.config.experiments import expand
from morebench.config.schema import Step
from morebench.matrix.cell import cell_of, run_ids
from morebench.matrix.ledger import State
from morebench.matrix.plan import make_plan
from morebench.matrix.sources import Sources


@pytest.fixture(scope="module")
def sources():
    return Sources()


def ids(sources, *overrides):
    return run_ids(cell_of(compose_config(overrides)), sources)


@pytest.mark.parametrize(
    "overrides",
    [
        ["llm.label=other"],
        ["vision.label=other", "pretrain_data.label=other", "suite.label=other"],
        ["trainer=cpu"],
        ["trainer.micro_batch_tokens=1", "trainer.num_workers=9", "trainer.devices=4"],
        ["tracking=none"],
        ["paths.runs=/elsewhere", "paths.reports=/elsewhere"],
        ["stage=pretrain", "stage=full"],
        ["hydra.launcher.n_jobs=3"],
        ["features=cached"],
    ],
)
def test_what_cannot_change_the_weights_is_not_in_the_id(sources, overrides):
    assert ids(sources, *overrides) == ids(sources)


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("llm=gemma2_9b", Step.pretrain),
        ("vision=siglip2", Step.pretrain),
        ("resolution=s2", Step.pretrain),
        ("pretrain_data=recap", Step.pretrain),
        ("seed=1", Step.pretrain),
        ("features=cached_8bit", Step.pretrain),
        ("projector=linear", Step.pretrain),
        ("llm.visual_scale=sqrt_hidden", Step.pretrain),
        ("llm.weights.revision=other", Step.pretrain),
        ("stage.pretrain.optimizer.lr=1", Step.pretrain),
        ("max_quarantined=0.5", None),
        ("unchecked_data=check", None),
        ("llm.chat_format=v1", Step.finetune),  # pretrain uses the plain format
        ("stage.finetune.optimizer.lr=1", Step.finetune),
        ("stage.finetune.order=modality", Step.finetune),
        ("stage.finetune.validation_samples=9", Step.finetune),
        ("finetune_data=digits", Step.finetune),
        ("stage.evaluate.profile=lmms_eval_0_7_3", Step.evaluate),
        ("suite=digits", Step.evaluate),
    ],
)
def test_a_change_reaches_the_steps_it_can_reach(sources, override, first_changed):
    before, after = ids(sources), ids(sources, override)
    chain = list(before)
    changed = [step for step in chain if before[step].rsplit(".", 1)[1] != after[step].rsplit(".", 1)[1]]
    assert changed == (chain[chain.index(first_changed) :] if first_changed else [])


def test_the_content_of_weights_is_in_the_id_and_their_place_is_not(tmp_path):
    def with_weights(place, content):
        folder = tmp_path / place / "microsoft" / "Phi-4-mini-instruct"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(content)
        return ids(Sources(), f"paths.weights={tmp_path / place}", f"paths.cache={tmp_path / 'cache'}")

    first = with_weights("here", b"1")
    assert with_weights("there", b"1") == first
    assert with_weights("there", b"22") != first


def test_only_the_steps_up_to_the_last_requested_one():
    assert list(ids(Sources(), "stage=finetune")) == [Step.pretrain, Step.finetune]


def test_the_study_is_23_models_and_46_trainings():
    plan = make_plan([cell_of(composed) for composed in assemble(expand(["experiments=all"]))])
    trainings = [run for run in plan.runs.values() if run.step is not Step.evaluate]
    assert (len(plan.cells), len(trainings), len(plan.runs)) == (23, 46, 69)
    assert plan.missing_sources


def test_cells_that_differ_after_pretrain_share_it(tmp_path):
    rows = expand(["stage.finetune.optimizer.lr=1e-5,2e-5,3e-5", f"paths.runs={tmp_path}"])
    plan = make_plan([cell_of(composed) for composed in assemble(rows)])
    steps = [run.step for run in plan.runs.values()]
    assert steps == [Step.pretrain] + [Step.finetune] * 3 + [Step.evaluate] * 3
    assert all(run.state is State.missing for run in plan.runs.values())
    pretrain = next(iter(plan.runs.values()))
    assert len(pretrain.shared_by) == 3
    assert all(pretrain.run_id in run.parents.values() for run in list(plan.runs.values())[1:])


def test_done_runs_are_not_to_do(tmp_path):
    cell = cell_of(compose_config([f"paths.runs={tmp_path}"]))
    done = make_plan([cell]).runs
    for run in list(done.values())[:2]:
        run.folder.mkdir(parents=True)
        (run.folder / "DONE").write_text(json.dumps({"files": {}}))
    assert [run.step for run in make_plan([cell]).todo()] == [Step.evaluate]


def test_a_cell_is_named_by_its_axes():
    composed = compose_config(["llm=phi4", "vision=siglip2"])
    cell = cell_of(replace(composed, config=replace(composed.config, seed=7)))
    assert cell.name == "phi4-siglip2-native-lcs-s7"
