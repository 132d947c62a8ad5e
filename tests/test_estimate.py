"""What a run will cost, against numbers worked out by hand."""

import io
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories_data import paths_below

from morebench.config.assemble import assemble
from morebench.config.compose import compose_config
from morebench.config.experiments import expand
from morebench.config.schema import Config, Step
from morebench.data.checked import VERSION, Manifest
from morebench.data.checking.lengths import length_name
from morebench.errors import ConfigError
from morebench.matrix import ledger
from morebench.matrix.cell import cells_of
from morebench.matrix.estimate import Estimate, Estimator, estimates
from morebench.matrix.lengths import Reading, reading
from morebench.matrix.machine import gpus_here, machine_of
from morebench.matrix.once_each import OnceEach
from morebench.matrix.plan import Plan, make_plan
from morebench.matrix.prediction import write_prediction
from morebench.models.flops import llm_shape, sample_flops, sizes
from morebench.models.memory import image_bytes, memory
from morebench.models.room import BUSY_TOKENS, SHARE
from morebench.show_costs import print_costs

A100, TRAIN = 312e12, (Step.pretrain, Step.finetune)


@pytest.fixture(scope="module")
def study() -> Plan:
    return make_plan(cells_of(assemble(expand(["experiments=all", "tracking=none"]))))


@pytest.fixture(scope="module")
def config() -> Config:
    return compose_config(["llm=gemma2_9b", "vision=siglip2", "tracking=none"]).config


def on(config: Config, **trainer: Any) -> Config:
    return replace(config, trainer=replace(config.trainer, **trainer))


def one(config: Config, step: Step, here: tuple[str, ...] = ()) -> Estimate:
    return Estimator(here).estimate("gemma2_9b", config, step)


def manifest(num_samples: int, tokens: Mapping[str, dict[str, Any]]) -> Manifest:
    texts = ("label", "content_hash", "quarantine_sha256", "images_sha256", "checked")
    mappings = ("records", "quarantined", "kept", "characters")
    return Manifest(
        version=VERSION,
        num_records=num_samples,
        num_samples=num_samples,
        num_images=1,
        image_bytes=1,
        also_quarantine=[],
        allowed_links=[],
        tokens=dict(tokens),
        **dict.fromkeys(texts, ""),
        **{name: {} for name in mappings},
    )


def test_the_whole_study_costs_what_was_worked_out_by_hand(study: Plan) -> None:
    """23 models: 211 exaFLOP in pretrain and 495 in finetune, 628 A100-hours at the peak."""
    found = estimates(study, Estimator(here=()))
    trained = {step: [found[run.run_id] for run in study.runs.values() if run.step is step] for step in TRAIN}
    assert sum(map(len, trained.values())) == 46
    flops = {step: sum(cost.flops or 0 for cost in costs) for step, costs in trained.items()}
    assert flops[Step.pretrain] / 1e18 == pytest.approx(211, rel=0.01)
    assert flops[Step.finetune] / 1e18 == pytest.approx(495, rel=0.01)
    assert sum(flops.values()) / A100 / 3600 == pytest.approx(628, rel=0.01)


@pytest.mark.parametrize(
    ("llm", "vision", "resolution", "pretrain", "finetune"),
    [
        ("gemma2_2b", "clip", "native", 2.7, 6.7),
        ("phi4", "siglip2", "native", 5.4, 12.3),
        ("gemma2_9b", "dinov2", "native", 4.8, 16.6),
        ("gemma2_9b", "siglip2", "s2", 17.5, 35.3),
    ],
)
def test_hours_of_one_a100_by_hand(
    study: Plan, llm: str, vision: str, resolution: str, pretrain: float, finetune: float
) -> None:
    """At the whole peak; 45 % of it is what conf/gpus expects, and recompute comes on top."""
    chosen = {"llm": llm, "vision": vision, "resolution": resolution, "pretrain_data": "lcs"}
    (cell,) = (cell for cell in study.cells if chosen.items() <= cell.choices.items())
    costs = {step: Estimator(()).estimate(llm, cell.config, step) for step in TRAIN}
    for step, hours in ((Step.pretrain, pretrain), (Step.finetune, finetune)):
        assert (costs[step].flops or 0) / A100 / 3600 == pytest.approx(hours, rel=0.02)
    before, after = costs[Step.pretrain], costs[Step.finetune]
    assert (before.seconds or 0) * 0.45 * A100 == pytest.approx(before.flops)
    again = after.recomputed / 3  # of a trained block's forward and backward; the rest is head and vision
    extra = (after.seconds or 0) * 0.45 * A100 / (after.flops or 1) - 1
    assert 0.6 * again <= extra <= again
    assert again > 0


def test_counted_lengths_go_before_assumed_ones(config: Config) -> None:
    """Three samples of 800, 900 and 40 tokens, the last without an image."""
    facts = {"tokens": 1740, "squared_lengths": 800**2 + 900**2 + 40**2, "images": 2, "supervised": 60}
    facts |= {"quantiles": {"100": 900}}
    recipe = replace(config.stage.finetune, global_batch_size=1)
    config = replace(config, stage=replace(config.stage, finetune=recipe))
    found = reading(
        "mine", config, Step.finetune, manifest(3, {length_name("mine", "Gemma-2", 729, 4096): facts})
    )
    assert found == Reading(3, 1740, facts["squared_lengths"], 2, 60, longest=900, is_counted=True)
    other = reading(
        "mine", config, Step.finetune, manifest(3, {length_name("mine", "plain", 729, 4096): facts})
    )
    assert other is not None
    assert not other.is_counted
    assert other.samples == 3, "as many as there are, each of the usual length"


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({}, 665_298),
        ({"epochs": 2}, 2 * 665_298),
        ({"max_steps": 10}, 1280),
        ({"max_steps": 10**6}, 665_298),
        ({"validation_samples": 298}, 665_000),
    ],
)
def test_only_what_is_read_costs(config: Config, changes: dict[str, int], samples: int) -> None:
    recipe = replace(config.stage.finetune, **changes)
    changed = replace(config, stage=replace(config.stage, finetune=recipe))
    found, whole = reading("x", changed, Step.finetune, None), reading("x", config, Step.finetune, None)
    assert found is not None
    assert whole is not None
    assert found.samples == pytest.approx(samples)
    assert found.tokens / whole.tokens == pytest.approx(samples / 665_298)
    assert found.longest == whole.longest


def test_a_step_is_the_sum_of_its_samples(config: Config) -> None:
    model, trained = sizes(config), config.stage.finetune.trainable
    by_hand = 624_610 * sample_flops(model, 979, 1, 125, trained) + 40_688 * sample_flops(
        model, 1000, 0, 500, trained
    )
    assert one(config, Step.finetune).flops == pytest.approx(by_hand, rel=1e-9)


def test_an_evaluate_step_reads_every_image_once(config: Config) -> None:
    """GQA asks 12,578 questions about 398 images; here of 34 tokens, answered by three."""
    task = config.suite.tasks["gqa"]
    gqa = replace(config, suite=replace(config.suite, tasks={"gqa": task}))
    model, shape = sizes(config), llm_shape(config)
    head = 2 * shape["hidden_size"] * shape["vocab_size"]

    def forward(tokens: int) -> float:
        pairs = 2 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * tokens**2
        return 2 * model.llm_body * tokens + pairs

    image = model.vision_image + 729 * 2 * sum(model.projector)
    read_again = (12_578 - 398) * (image + forward(729))
    by_hand = 12_578 * (image + forward(729 + 34 + 2) + 3 * head) - read_again
    cost = one(gqa, Step.evaluate)
    assert cost.flops == pytest.approx(by_hand, rel=1e-9)
    assert (cost.seconds or 0) * A100 * 0.25 == pytest.approx(by_hand, rel=1e-9)
    keys_and_values = 32 * (729 + 4 * 34 + 3) * 2 * 2 * 42 * 8 * 256
    weights = memory(config, 1, 0, 0, []).state
    few = one(on(gqa, evaluate_batch_size=32), Step.evaluate)
    assert few.memory == pytest.approx(weights + keys_and_values)
    assert cost.memory == pytest.approx((weights + 63.4 * 2**30) / 2)  # half of what is free
    more = on(gqa, devices="4", evaluate_cache_gib=1.0)
    assert (one(more, Step.evaluate).seconds or 0) == pytest.approx((cost.seconds or 0) / 4)
    assert one(more, Step.evaluate).gpu_hours == pytest.approx(cost.gpu_hours)
    assert one(more, Step.evaluate).memory == pytest.approx(weights + 2**30)
    recipe = replace(config.stage.evaluate, controls=["blind"])
    twice = replace(gqa, stage=replace(config.stage, evaluate=recipe))
    assert one(twice, Step.evaluate).flops == pytest.approx(2 * by_hand)
    unknown = replace(task, assumed=None)
    estimator = Estimator(())
    changed = replace(config, suite=replace(config.suite, tasks={"gqa": task, "other": unknown}))
    assert estimator.estimate("gemma2_9b", changed, Step.evaluate).flops is None
    assert any("other: nothing is assumed of its questions" in note for note in estimator.notes)


def test_cached_features_save_the_vision_encoder(config: Config) -> None:
    cached = replace(config, features=type(config.features).cached)
    saved = (one(config, Step.pretrain).flops or 0) - (one(cached, Step.pretrain).flops or 0)
    assert saved == pytest.approx(558_128 * sizes(config).vision_image, rel=1e-6)


def test_disk_holds_three_checkpoints_and_then_the_parts(config: Config) -> None:
    """Gemma-2-9B has 9.24 billion weights, its tied embeddings once."""
    cost = one(config, Step.finetune)
    assert (cost.kept or 0) / 4 == pytest.approx(9.24e9, rel=0.01)
    assert cost.peak == 9 * (cost.kept or 0)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_what_is_proposed_fits_and_less_does_not(config: Config, name: str) -> None:
    config = on(config, micro_batch_tokens=None)
    alone = one(on(config, devices="1"), Step.finetune)
    assert "4 GPUs with trainer.strategy=fsdp2 fit it" in alone.remedy
    strategy = type(config.trainer.strategy)[name]
    assert one(on(config, devices="4", strategy=strategy), Step.finetune).remedy == ""
    two = one(on(config, devices="2", strategy=strategy), Step.finetune)
    assert "; 4 GPUs" in two.remedy
    assert one(on(config, gpu="a100_40gb", devices="64"), Step.finetune).remedy, "ddp shards nothing"


def test_no_more_is_recomputed_than_memory_demands(config: Config) -> None:
    """Between all and nothing on GPUs of different size, and never where the LLM is frozen."""
    config = on(config, micro_batch_tokens=None, devices="8", strategy=type(config.trainer.strategy).fsdp2)
    shares = [one(on(config, gpu=gpu), Step.finetune).recomputed for gpu in ("a100_64gb", "h200_141gb")]
    assert 0 <= shares[1] < shares[0] <= 1
    cost = one(on(config, gpu="h200_141gb"), Step.finetune)
    assert cost.recomputed
    assert (cost.memory or 0) <= SHARE * 139.8 * 2**30
    fewer = on(config, gpu="h200_141gb", recompute=cost.recomputed - 1 / 42, micro_batch_tokens=BUSY_TOKENS)
    assert one(fewer, Step.finetune).remedy
    assert one(on(config, gpu="a100_40gb"), Step.pretrain).recomputed == 0


def test_a_micro_batch_is_as_large_as_the_engine_would_make_it(config: Config) -> None:
    """What it keeps goes by tokens, pixels too; a rank has no more than its part of a global batch."""
    recipe = config.stage.pretrain
    read = reading("gemma2_9b", config, Step.pretrain, None)
    assert read is not None
    usual = read.tokens / read.samples
    images = read.images / read.samples
    text = read.supervised / read.samples

    def kept(tokens: int, **trainer: Any) -> float:
        found = one(on(config, micro_batch_tokens=tokens, **trainer), Step.pretrain)
        return (found.memory or 0) - memory(config, 1, 0, 0, recipe.trainable).state

    sample = memory(config, usual, images, text, recipe.trainable, 0, config.trainer.attention).sample
    sample += images * image_bytes(config)
    assert kept(16_384) == pytest.approx(sample * 16_384 / usual, rel=1e-6)
    assert sample < kept(512) < 2 * sample, "one sample, the longest"
    ranks = recipe.global_batch_size // 8
    assert kept(10**6, devices=str(ranks)) == pytest.approx(8 * sample, rel=1e-6)
    open_ = one(on(config, micro_batch_tokens=None, gpu="a100_40gb"), Step.pretrain)
    share = SHARE * 39.4 * 2**30
    assert share / 2 < (open_.memory or 0) <= share


def test_which_gpus_a_plan_is_for(config: Config, tmp_path: Path) -> None:
    driver = tmp_path / "gpus"
    for number in range(2):
        (driver / f"0000:{number}").mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   {number}\n"
        (driver / f"0000:{number}" / "information").write_text(text)
    here = gpus_here(driver)
    assert here == ("NVIDIA H100 80GB HBM3",) * 2
    assert gpus_here(tmp_path / "none") == ()

    def told(here: tuple[str, ...], is_planned: bool = True, **trainer: Any) -> tuple[str | None, int, int]:
        machine = machine_of(on(config, **trainer).trainer, here, is_planned)
        return machine.gpu and machine.gpu.label, machine.num_gpus, len(machine.notes)

    assert told(here) == ("H100 80 GB", 2, 0)
    assert told((), devices="4", num_nodes=2) == ("A100 64 GB (the study's)", 8, 1)
    assert told(()) == ("A100 64 GB (the study's)", 1, 2), "both the type and the number are assumed"
    assert told(here, gpu="h200_141gb", devices="8") == ("H200 141 GB", 8, 0)
    assert told(here, is_planned=False, gpu="h200_141gb") == ("H100 80 GB", 2, 0), "it runs on what is there"
    assert told((), is_planned=False) == (None, 1, 0)
    assert told(here, accelerator="cpu", devices="2") == (None, 2, 0)
    assert told(("GeForce 256",)) == (None, 1, 1)
    with pytest.raises(ConfigError, match=r"trainer.gpu=a100: there is no .* There are: a100_40gb"):
        machine_of(on(config, gpu="a100").trainer, ())


def test_without_a_gpu_only_the_work_is_known(config: Config) -> None:
    cost = one(on(config, accelerator="cpu"), Step.pretrain)
    assert cost.flops
    assert (cost.seconds, cost.memory, cost.gpu_hours) == (None, None, None)
    recipe = replace(config.stage.pretrain, precision=type(config.stage.pretrain.precision).fp32)
    exact = replace(config, stage=replace(config.stage, pretrain=recipe))
    assert one(exact, Step.pretrain).seconds is None, "a GPU's peak is that of bf16"
    unknown = replace(config, pretrain_data=replace(config.pretrain_data, assumed_lengths=[]))
    estimator = Estimator(())
    assert estimator.estimate("gemma2_9b", unknown, Step.pretrain).flops is None
    assert any("before `data check llm=gemma2_9b` counts them" in note for note in estimator.notes)


def test_cells_that_share_their_parts_are_priced_once(study: Plan) -> None:
    estimator, config = Estimator(()), study.cells[0].config
    first = estimator.estimate("gemma2_2b", config, Step.pretrain)
    assert estimator.estimate("gemma2_2b", replace(config, seed=9), Step.pretrain) is first
    longer = replace(config, stage=replace(config.stage))
    assert estimator.estimate("gemma2_2b", longer, Step.pretrain) == first


def test_results_are_remembered_for_the_very_objects() -> None:
    once, seen = OnceEach(), []

    def look(part: list[int]) -> int:
        seen.append(part)
        return len(seen)

    part = [1]
    assert [once(look, part), once(look, part), once(look, [1]), once(len, part)] == [1, 1, 2, 1]
    assert [once(look, [number]) for number in range(100)] == list(range(3, 103)), "no id comes twice"


def test_a_plan_is_readable_on_a_narrow_terminal(study: Plan) -> None:
    priced = on(study.cells[0].config, usd_per_gpu_hour=2.0)
    cells = [replace(cell, config=replace(cell.config, trainer=priced.trainer)) for cell in study.cells]
    out = io.StringIO()
    print_costs(replace(study, cells=cells), out)
    table, _, rest = out.getvalue().partition("\n\n")
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("  pretrain") for line in lines) == 23
    assert len(lines) == 1 + 4 * 23
    assert "To train: 46 of 46 runs. 706 EFLOP, " in rest
    assert " USD at 2 a GPU-hour." in rest
    assert "\nTo evaluate: 23 of 23 runs. 5.15 EFLOP, " in rest
    assert "61,605 questions about 20,057 images, of 69 text tokens and answers of 2.6 on average" in rest
    assert "558,128 samples of 25 text tokens (20 supervised) and an image" in rest
    assert "GPU: A100 64 GB (the study's)" in rest


def test_a_shared_run_stands_once(study: Plan) -> None:
    """A cell that differs in its suite shares the trained models."""
    twice = replace(study, cells=[study.cells[0]] * 2, ids=[study.ids[0]] * 2)
    runs = {run_id: study.runs[run_id] for run_id in study.ids[0].values()}
    out = io.StringIO()
    print_costs(replace(twice, runs=runs), out)
    assert out.getvalue().count("shared with a cell above") == 3
    assert "To train: 2 of 2 runs." in out.getvalue()
    assert "To evaluate: 1 of 1 runs." in out.getvalue()


def test_a_manifest_keeps_what_was_predicted_first(config: Config, tmp_path: Path) -> None:
    config = replace(on(config, accelerator="cpu"), paths=paths_below(tmp_path))
    for step in (Step.pretrain, Step.evaluate):
        (tmp_path / step.name).mkdir()
        ledger.write_json(tmp_path / step.name / "manifest.json", {"step": step.name})
        write_prediction(tmp_path / step.name, config, step, "gemma2_9b")
    written = ledger.read_json(tmp_path / "pretrain" / "manifest.json")
    assert written["step"] == "pretrain"
    assert written["predicted"]["flops"] == one(config, Step.pretrain).flops
    assert written["predicted"]["seconds"] is None
    answered = ledger.read_json(tmp_path / "evaluate" / "manifest.json")["predicted"]
    assert answered["flops"] == one(config, Step.evaluate).flops
    recipe = replace(config.stage.pretrain, max_steps=1)
    less = replace(config, stage=replace(config.stage, pretrain=recipe))
    write_prediction(tmp_path / "pretrain", less, Step.pretrain, "gemma2_9b")
    assert ledger.read_json(tmp_path / "pretrain" / "manifest.json") == written


def test_estimates_need_no_torch() -> None:
    code = "import sys, morebench.show_costs, morebench.matrix.prediction; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
