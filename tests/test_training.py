import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories_training import GLOBAL_BATCH, LLM_SHAPES, make_cell, metrics, with_recipe, with_trainer
from gradients import distance, ours, stock
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from morebench.config.schema import Config, Part, Precision, Resolution, Step
from morebench.errors import ConfigError, NonFiniteError
from morebench.training.module import StageModule
from morebench.training.run import train
from morebench.training.schedule import cosine_with_warmup, num_warmup_steps
from morebench.training.signals import StopRequest
from morebench.training.stage import make_stage
from morebench.training.strategy import make_trainer, sharding_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cell")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return make_cell(root)


@pytest.fixture(scope="module")
def pretrained(root: Path, config: Config) -> Path:
    train(config, Step.pretrain, root / "pretrained", {})
    return root / "pretrained"


@pytest.fixture(scope="module")
def finetuned(root: Path, config: Config, pretrained: Path) -> Path:
    train(config, Step.finetune, root / "finetuned", {Step.pretrain: pretrained})
    return root / "finetuned"


@pytest.mark.parametrize(("num_steps", "ratio"), [(2181, 0.03), (5198, 0.03), (7, 0.0), (3, 1.0), (1, 0.5)])
def test_learning_rate_is_that_of_transformers(num_steps: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = num_warmup_steps(num_steps, ratio)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        assert cosine_with_warmup(step, num_steps, warmup) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def test_warm_up_is_rounded_up_as_in_the_study() -> None:
    assert [num_warmup_steps(steps, 0.03) for steps in (2181, 5198)] == [66, 156]


@pytest.mark.parametrize("family", LLM_SHAPES)
def test_gradients_do_not_depend_on_the_micro_batches(
    family: str, tmp_path: Path, pretrained: Path, config: Config
) -> None:
    """One of 16, three uneven ones, 16 of one sample (some text-only), 20 of which four are empty."""
    cell = config if family == "gemma2" else make_cell(tmp_path, family)
    expected_loss, expected = stock(cell, pretrained)
    for micro_batches in (1, 3, GLOBAL_BATCH, GLOBAL_BATCH + 4):
        loss, gradients = ours(cell, micro_batches, pretrained)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert distance(gradients, expected) < 1e-5, f"{micro_batches} micro-batches"


def test_micro_batches_change_no_weight_to_speak_of(
    config: Config, tmp_path: Path, pretrained: Path, finetuned: Path
) -> None:
    small = with_trainer(config, micro_batch_tokens=300)
    train(small, Step.finetune, tmp_path / "run", {Step.pretrain: pretrained})
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["micro_batches"] > 2
    for found, expected in zip(metrics(tmp_path / "run"), metrics(finetuned), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["supervised_tokens"] == expected["supervised_tokens"]
        assert found["tokens"] == expected["tokens"]


def test_only_trainable_parts_are_trained_and_saved(
    config: Config, pretrained: Path, finetuned: Path
) -> None:
    assert [path.name for path in pretrained.glob("*.safetensors")] == ["projector.safetensors"]
    before, after = (
        load_file(pretrained / "projector.safetensors"),
        load_file(finetuned / "projector.safetensors"),
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)
    start = load_file(Path(config.paths.weights) / "tiny" / "llm" / "model.safetensors")
    end = load_file(finetuned / "llm.safetensors")
    assert end.keys() == start.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_finetune_begins_where_pretrain_ended(config: Config, pretrained: Path) -> None:
    stage = make_stage(config, Step.finetune, {Step.pretrain: pretrained})
    expected = load_file(pretrained / "projector.safetensors")
    assert all(
        torch.equal(value, expected[name]) for name, value in stage.mllm.projector.state_dict().items()
    )


def test_optimizer_holds_the_trainable_parameters_alone(config: Config) -> None:
    stage = make_stage(config, Step.pretrain, {})
    module = StageModule(
        stage.mllm,
        stage.recipe,
        num_steps=1,
        first_step=0,
        sharding=sharding_of(make_trainer(config.trainer, stage.recipe)),
        samples=[],
        stop=StopRequest(),
    )
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.mllm.projector.parameters()}


def test_loss_falls_and_first_step_has_no_learning_rate(finetuned: Path) -> None:
    lines = metrics(finetuned)
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0]["lr"] == 0.0
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    fields = (
        "step loss validation_loss lr supervised_tokens tokens tokens_per_s supervised_tokens_per_s flops "
        "tflops mfu padding data_wait_s forward_s backward_s optimizer_s step_s peak_memory_gib grad_norm "
        "skipped seconds gpu_hours energy_kwh"
    )
    assert all(list(line) == fields.split() for line in lines)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_same_cell_twice_gives_the_same_bits(
    config: Config, tmp_path: Path, pretrained: Path, finetuned: Path, num_workers: int
) -> None:
    again = with_trainer(config, num_workers=num_workers)
    train(again, Step.finetune, tmp_path / "run", {Step.pretrain: pretrained})
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [
        line["loss"] for line in metrics(finetuned)
    ]
    for part in (Part.projector, Part.llm):
        name = f"{part.name}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (finetuned / name).read_bytes()


def test_another_seed_gives_another_run(config: Config, tmp_path: Path, pretrained: Path) -> None:
    train(replace(config, seed=1), Step.pretrain, tmp_path / "run", {})
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(pretrained)[0]["loss"]


def test_manifest_says_what_was_done(finetuned: Path) -> None:
    manifest = json.loads((finetuned / "manifest.json").read_text())
    assert manifest["num_steps"] == 6
    assert (manifest["micro_batches"], manifest["threads"], manifest["world_size"]) == (1, 1, 1)
    assert manifest["data"]["num_samples"] == 44
    assert (manifest["quarantined"], manifest["truncated"], manifest["unsupervised"]) == (0, 0, 0)
    assert manifest["data"]["quarantined"] == {}
    assert manifest["anomalies"] == []
    assert set(manifest["weights"]) == {"llm", "vision", "projector"}
    assert set(manifest["parts"]) == {"llm.safetensors", "projector.safetensors"}
    assert manifest["seconds"] > 0
    assert manifest["gpu_hours"] is None
    assert {"git", "lock_sha256", "hardware", "versions"} <= manifest.keys()


def test_threads_asked_for_are_used(config: Config, tmp_path: Path) -> None:
    train(with_recipe(with_trainer(config, threads=3), max_steps=1), Step.pretrain, tmp_path, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["threads"] == 3


def test_manifest_keeps_what_others_wrote(config: Config, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"run_id": "mine"}')
    train(with_recipe(config, max_steps=1), Step.pretrain, tmp_path, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["run_id"] == "mine"


def test_run_leaves_nothing_else_behind(finetuned: Path) -> None:
    names = {"manifest.json", "metrics.jsonl", "llm.safetensors", "projector.safetensors"}
    assert {path.name for path in finetuned.iterdir()} == names


def test_finished_run_is_left_alone(config: Config, finetuned: Path, pretrained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finetuned.iterdir()}
    train(config, Step.finetune, finetuned, {Step.pretrain: pretrained})
    assert {path: path.stat().st_mtime_ns for path in finetuned.iterdir()} == before


def test_non_finite_step_stops_before_a_weight_changes(config: Config, tmp_path: Path) -> None:
    wild = with_recipe(config, optimizer=replace(config.stage.pretrain.optimizer, lr=1e38))
    with pytest.raises(NonFiniteError, match=r"Optimizer step 2: loss .* samples: s\d+, s\d+"):
        train(wild, Step.pretrain, tmp_path, {})
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    saved = load_file(tmp_path / "checkpoints" / "step_00000002" / "parameters.rank0000.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_gradient_norm_is_logged_before_clipping(config: Config, tmp_path: Path, pretrained: Path) -> None:
    clipped = with_recipe(config, gradient_clip_val=1e-3, max_steps=2)
    train(clipped, Step.pretrain, tmp_path, {})
    assert metrics(tmp_path)[0]["grad_norm"] == metrics(pretrained)[0]["grad_norm"] > 1e-3


def test_bf16_keeps_master_copies_of_trained_parts(config: Config, tmp_path: Path, pretrained: Path) -> None:
    half = with_recipe(config, precision=Precision.bf16, max_steps=2)
    dtypes = {
        (name.split(".")[0], value.dtype)
        for name, value in make_stage(half, Step.pretrain, {}).mllm.named_parameters()
    }
    assert dtypes == {
        ("vision", torch.bfloat16),
        ("llm", torch.bfloat16),
        ("projector", torch.float32),
    }
    train(half, Step.pretrain, tmp_path, {})
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(metrics(pretrained)[0]["loss"], rel=0.02)


def test_s2_trains(config: Config, tmp_path: Path) -> None:
    s2 = with_recipe(replace(config, resolution=Resolution(label="S2", scales=[1, 2])), max_steps=1)
    train(s2, Step.pretrain, tmp_path, {})
    assert load_file(tmp_path / "projector.safetensors")["0.weight"].shape == (32, 2 * 16)
    assert math.isfinite(metrics(tmp_path)[0]["loss"])


def test_a_chat_format_of_another_family_is_refused_before_a_sample_is_read(config: Config) -> None:
    other = replace(config, llm=replace(config.llm, chat_format="chatml"))
    with pytest.raises(ConfigError, match=r"'<\|im_start\|>', '<\|im_end\|>', '<\|endoftext\|>'\. Choose"):
        make_stage(other, Step.pretrain, {})


def test_samples_may_not_be_longer_than_positions_are_rotated_alike(config: Config) -> None:
    phi = replace(config, llm=replace(config.llm, shape="llm/phi_tiny.json"))
    with pytest.raises(ConfigError, match=r"stage\.pretrain\.max_length=1025, but .*embeddings=1024"):
        make_stage(with_recipe(phi, max_length=1025), Step.pretrain, {})


def test_log_is_a_line_at_the_start_and_the_end(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(with_recipe(config, max_steps=2), Step.pretrain, tmp_path, {})
    out, err = capfd.readouterr()
    assert out == ""
    first, dry_step, last = err.splitlines()
    assert [line.split(":")[0] for line in (first, last)] == ["pretrain 0/2", "pretrain 2/2"]
    counts = r"[\d,]+ tokens, \d+ images, \d+ supervised tokens"
    assert re.fullmatch(rf"pretrain: the largest micro-batch fits: {counts}, \d\.\d s\.", dry_step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu: torch finds no GPU here"):
        make_trainer(with_trainer(config, accelerator="gpu").trainer, config.stage.pretrain)
