"""Cells that share data see the same samples, whatever their LLM, and what is quarantined is so for all."""

from pathlib import Path

import pytest
from factories_training import make_cell

from morebench.config.schema import AXES, Config, Step
from morebench.data.checking.check import check_data
from morebench.errors import DataError
from morebench.matrix.cell import Cell, run_ids
from morebench.matrix.sources import Sources
from morebench.training.stage import make_stage

FAMILIES = ("gemma2", "llama")


def global_batches(config: Config) -> list[list[str]]:
    """Ids of the samples of every optimizer step."""
    stage = make_stage(config, Step.pretrain, {})
    plan = stage.plan(1, stage.micro_batches(1, config.trainer.micro_batch_tokens))
    return [
        [stage.data.samples[number].id for number in plan.global_batch(step).tolist()]
        for step in range(plan.num_steps)
    ]


def run_id(config: Config) -> str:
    choices = {**dict.fromkeys(AXES, "toy"), "pretrain_data": "toy"}
    config.stage.steps = [Step.pretrain]
    return run_ids(Cell(choices, config), Sources())[Step.pretrain]


def test_two_llms_see_the_same_samples_and_quarantine_changes_both_alike(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path / family, family) for family in FAMILIES]
    whole = [global_batches(config) for config in cells]
    ids = [run_id(config) for config in cells]
    assert whole[0] == whole[1]
    assert ids[0] != ids[1]
    damaged = whole[0][0][0]
    for config in cells:
        image = Path(config.paths.data) / "toy" / "images" / f"{int(damaged[1:]) | 1}.png"
        image.write_bytes(image.read_bytes()[:50])
        check_data(config.pretrain_data, config.paths, 0, lambda text: None)
        config.max_quarantined = 0.1
    left = [global_batches(config) for config in cells]
    assert left[0] == left[1]
    assert left[0] != whole[0]
    gone = {name for batch in whole[0] for name in batch} - {name for batch in left[0] for name in batch}
    assert gone == {f"s{int(damaged[1:]) | 1}"}
    assert [run_id(config) for config in cells] != ids
    assert not set(ids) & {run_id(config) for config in cells}


def test_a_run_trains_on_the_data_that_its_id_was_made_of(tmp_path: Path) -> None:
    """The data is checked anew between planning and starting, as while a job waits in a queue."""
    config = make_cell(tmp_path, "llama")
    planned = make_stage(config, Step.pretrain, {}).data.content_hash
    (Path(config.paths.data) / "toy" / "images" / "1.png").write_bytes(b"")
    check_data(config.pretrain_data, config.paths, 0, lambda text: None)
    config.max_quarantined = 0.1
    with pytest.raises(DataError, match=f"planned for data {planned[:12]}, and what is checked now is"):
        make_stage(config, Step.pretrain, {}, planned_data=planned)
    make_stage(config, Step.pretrain, {})
