"""Two gloo ranks under every strategy: loss and gradients of one optimizer step are those of one rank."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from factories_training import GLOBAL_BATCH, make_cell, with_recipe, with_trainer
from gradients import Case, distance, from_file, ours_to_files, stock
from training_processes import run_ranks

from morebench.config.schema import Config, Part, Precision, Step, Strategy
from morebench.models.parts import build_mllm, save_parts
from morebench.training.stage import make_stage

STRATEGIES = [Strategy.ddp, Strategy.fsdp2]
FAMILIES = ["gemma2", "llama"]  # a tied head, and one of its own
# more bins than samples: empty ones, and text-only ones on a rank beside images on the other
MANY = GLOBAL_BATCH // 2 + 2

CUT = {"gemma_2": 30, "llama_3_1": 233}  # by chat format: below what a sample with an image needs
EXACT = ["one", "three", "many", "pretrain", "pretrain_many", "cut", "chunked", "recompute"]


def shortened(config: Config) -> Config:
    return with_recipe(config, max_length=CUT[config.llm.chat_format])


def cases(config: Config) -> dict[str, Case]:
    bf16 = with_recipe(config, precision=Precision.bf16)
    return {
        "one": Case(config, 1),
        "three": Case(config, 3),
        "many": Case(config, MANY),
        "pretrain": Case(config, 3, Step.pretrain),  # the LLM is frozen
        "pretrain_many": Case(config, MANY, Step.pretrain),
        "cut": Case(shortened(config), MANY),  # some samples have no supervised token left
        "chunked": Case(config, 2, logits_per_chunk=1),  # a chunk for each position
        "recompute": Case(config, 2, logits_per_chunk=4000, recompute=True),
        "bf16": Case(bf16, 3),
    }


@pytest.fixture(scope="module", params=FAMILIES)
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """With a pretrain run's folder: the projector's start will do."""
    root = tmp_path_factory.mktemp(request.param)
    config = make_cell(root, request.param)
    stage = make_stage(config, Step.pretrain, {})
    mllm = build_mllm(config, stage.weights, Precision.fp32, [Part.projector])
    (root / "pretrained").mkdir()
    save_parts(mllm, [Part.projector], root / "pretrained")
    return config, root / "pretrained"


@pytest.fixture(scope="module")
def expected(cell: tuple[Config, Path]) -> dict[str, tuple[float, dict]]:
    config, pretrained = cell
    pretrain = stock(config, pretrained, Step.pretrain)
    finetune = stock(config, pretrained)
    known = {"pretrain": pretrain, "pretrain_many": pretrain}
    known["cut"] = stock(shortened(config), pretrained)
    return {name: known.get(name, finetune) for name in cases(config)}


@pytest.fixture(scope="module", params=STRATEGIES, ids=lambda strategy: strategy.name)
def found(
    request: pytest.FixtureRequest, cell: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config, pretrained = cell
    folder = tmp_path_factory.mktemp(request.param.name)
    under = cases(with_trainer(config, strategy=request.param))
    assert run_ranks(2, ours_to_files, under, pretrained, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_have_the_gradients_of_one(
    found: Path, expected: Mapping[str, tuple[float, dict]], name: str
) -> None:
    expected_loss, gradients = expected[name]
    for rank in (0, 1):
        loss, seen = from_file(found / f"{name}.rank{rank}.safetensors")
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert distance(seen, gradients) < 1e-5


def test_bf16_is_near_and_its_gradients_are_fp32(
    found: Path, expected: Mapping[str, tuple[float, dict]]
) -> None:
    expected_loss, gradients = expected["bf16"]
    loss, seen = from_file(found / "bf16.rank0.safetensors")
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert distance(seen, gradients) < 0.03
    assert {str(value.dtype) for value in seen.values()} == {"torch.float32"}


def test_the_cut_case_has_samples_without_supervised_tokens(cell: tuple[Config, Path]) -> None:
    config, pretrained = cell
    stage = make_stage(shortened(config), Step.finetune, {Step.pretrain: pretrained})
    first = stage.plan(1, 1).global_batch(0)
    assert (stage.index.supervised[first] == 0).any()
    assert (stage.index.supervised[first] > 0).any()
