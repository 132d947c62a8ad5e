"""A whole evaluation of a tiny cell: what it leaves, how it continues, what it refuses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_evaluation import CLASSES, NUM_ITEMS, make_task
from factories_training import make_cell, with_trainer
from PIL import Image

from morebench.config.schema import Config, Part, Profile, Suite
from morebench.errors import ConfigError, DataError, FencedError, MorebenchError, WeightsError
from morebench.evaluation.controls import blind
from morebench.evaluation.generate import Answer, Generator, Request
from morebench.evaluation.items import StoredImage
from morebench.evaluation.predictions import PredictionsFile
from morebench.evaluation.records import open_task
from morebench.evaluation.run import evaluate
from morebench.models.parts import build_mllm, save_parts
from morebench.models.weights import starting_weights
from morebench.reporting.results import scored_items

Cell = tuple[Config, Path]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """A config with three tasks, and the folder of a finetune run (of random weights)."""
    root = tmp_path_factory.mktemp("cell")
    config = make_cell(root)
    generator = np.random.default_rng(0)
    tasks = {name: make_task(root / "data" / "toy", name, generator) for name in CLASSES}
    recipe = replace(config.stage.evaluate, controls=["blind"])
    config = replace(
        config,
        suite=Suite(label="Toy", tasks=tasks, columns=[]),
        stage=replace(config.stage, evaluate=recipe),
    )
    parent = root / "runs" / "finetune"
    parent.mkdir(parents=True)
    torch.manual_seed(1)
    save_parts(
        build_mllm(config, dict(starting_weights(config)), recipe.precision),
        config.stage.finetune.trainable,
        parent,
    )
    return config, parent


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def artefacts(folder: Path) -> dict[str, Any]:
    """Every file an evaluation leaves but for what a clock wrote."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.jsonl"))
    }
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("seconds") > 0
    return files | results


@pytest.fixture(scope="module")
def evaluated(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(cell[0], folder, cell[1])
    return folder


def test_leaves_predictions_and_scores_in_record_order(evaluated: Path) -> None:
    for name in CLASSES:
        for control in (None, "blind"):
            pairs = scored_items(evaluated, name, control)  # refuses two files that differ in order
            assert [line["id"] for line, _ in pairs] == [f"{name}{number}" for number in range(NUM_ITEMS)]
            assert {len(line["prompt_sha256"]) for line, _ in pairs} == {64}
            assert all(line["image"].endswith(".png") for line, _ in pairs)


def test_results_are_the_aggregates_of_the_scores(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    assert set(results) == {"profile", "tasks", "controls", "seconds"}
    assert set(results["tasks"]) == set(results["controls"]["blind"]) == set(CLASSES)
    scores = [item.score for _, item in scored_items(evaluated, "vqa")]
    assert results["tasks"]["vqa"]["n"] == NUM_ITEMS
    assert results["tasks"]["vqa"]["metrics"] == {"exact_match": sum(scores) / NUM_ITEMS}
    assert "f1" in results["tasks"]["pope"]["metrics"]


def test_the_image_changes_answers(evaluated: Path) -> None:
    texts = {
        control: [line["prediction"] for line, _ in scored_items(evaluated, "vqa", control)]
        for control in (None, "blind")
    }
    assert texts[None] != texts["blind"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("batches", "cut"), [(0, 0), (1, 40), (4, 0), (5, 7), (11, 2)])
def test_a_killed_evaluation_continues_to_the_same_files(
    cell: Cell, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, cut: int
) -> None:
    """Dies after some batches, the last line `cut` bytes short of its end."""
    config, parent = cell
    append, left = PredictionsFile.append, [batches]

    def fatal_append(self: PredictionsFile, lines: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        append(self, lines)
        if left[0] == 0 and cut:
            content = self._path.read_bytes()
            self._path.write_bytes(content[:-cut])

    with monkeypatch.context() as patched:
        patched.setattr(PredictionsFile, "append", fatal_append)
        with pytest.raises(Killed):
            evaluate(config, tmp_path, parent)
    assert not (tmp_path / "results.json").exists()
    generated = count_generated(monkeypatch)
    evaluate(config, tmp_path, parent)
    assert artefacts(tmp_path) == artefacts(evaluated)
    assert len(generated) == 20 - batches + (1 if cut else 0)  # 3, 3 and 4 chunks of 3 tasks, x 2


@pytest.mark.parametrize("allowed", [1, 3])
def test_an_evaluation_that_was_taken_over_writes_nothing_more(
    cell: Cell, tmp_path: Path, allowed: int
) -> None:
    """After one batch of the first task, or with all three before the file is put in order."""
    left = [allowed]

    def fence() -> None:
        if left[0] == 0:
            raise FencedError("taken")
        left[0] -= 1

    with pytest.raises(FencedError):
        evaluate(cell[0], tmp_path, cell[1], fence)
    (file,) = (tmp_path / "predictions").iterdir()
    assert len(file.read_text().splitlines()) <= 8 * allowed
    assert {path.name for path in tmp_path.iterdir()} == {"predictions"}


def count_generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of every batch that is generated from now on."""
    real = Generator.answer
    sizes: list[int] = []

    def counted(self: Generator, requests: Sequence[Request]) -> list[Answer]:
        answers = real(self, requests)
        sizes.append(len(answers))
        return answers

    monkeypatch.setattr(Generator, "answer", counted)
    return sizes


def test_a_second_evaluation_generates_nothing(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parent = cell
    evaluate(config, tmp_path, parent)
    before, generated = artefacts(tmp_path), count_generated(monkeypatch)
    evaluate(config, tmp_path, parent)
    assert (artefacts(tmp_path), generated) == (before, [])


def test_a_prediction_for_another_prompt_is_made_again(
    cell: Cell, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parent = cell
    lines = [json.loads(line) for line in (evaluated / "predictions" / "vqa.jsonl").read_text().splitlines()]
    lines[3] |= {"prompt_sha256": "0" * 64, "prediction": "stale"}
    make_folder(tmp_path / "predictions")
    (tmp_path / "predictions" / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(config, tmp_path, parent)
    assert artefacts(tmp_path) == artefacts(evaluated)


def test_batch_size_changes_no_answer(cell: Cell, evaluated: Path, tmp_path: Path) -> None:
    config, parent = cell
    evaluate(with_trainer(config, evaluate_batch_size=3), tmp_path, parent)
    assert artefacts(tmp_path) == artefacts(evaluated)


def test_odd_characters_in_an_answer_do_not_end_its_line(tmp_path: Path) -> None:
    path = tmp_path / "predictions" / "vqa.jsonl"
    line = {"index": 0, "prompt_sha256": "a", "prediction": "\u2028x\x85\r\n\u56fe\U0001f600"}
    with PredictionsFile(path, {0: "a"}) as file:
        file.append([line])
    for cut in range(1, len(path.read_bytes())):
        short = tmp_path / "predictions" / "short.jsonl"
        short.write_bytes(path.read_bytes()[:-cut])
        with PredictionsFile(short, {0: "a"}) as file:
            assert file.lines in ({}, {0: line})
    with PredictionsFile(path, {0: "a"}) as file:
        assert file.finish() == [line]


def test_blind_shows_the_mean_colour_in_the_same_size() -> None:
    image = Image.new("RGB", (6, 2), (0, 0, 0))
    image.paste((90, 30, 7), (0, 0, 2, 2))
    shown = blind(StoredImage("a", "a.png", lambda: image))
    assert shown.key != "a"
    assert shown.load().size == image.size
    assert shown.load().getcolors() == [(12, (30, 10, 2))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[1].pop("answer"), "record 1: no field answer"),
        (lambda records: records[1].pop("image"), "record 1: no field image"),
        (lambda records: records[1].update(image="gone.png"), r"record 1: image .*gone\.png does not exist"),
        (lambda records: records[1].update(image="../x.png"), "record 1: .*points outside"),
        (lambda records: records[1].update(answer="7"), "record 1: answer must be an index of `options`"),
        (
            lambda records: records[1].update(options=None),
            "record 1: a field is not of the type that AI2D needs",
        ),
        (lambda records: records.pop(), f"{NUM_ITEMS - 1} records, expected the published {NUM_ITEMS}"),
        (lambda records: records.clear(), "non-empty JSON list"),
    ],
)
def test_bad_records_are_named(
    cell: Cell, tmp_path: Path, change: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    task, paths = cell[0].suite.tasks["mc"], cell[0].paths
    folder = make_folder(tmp_path / "toy")
    (folder / "images").symlink_to(Path(paths.data) / "toy" / "images")
    records = json.loads((Path(paths.data) / "toy" / "mc.json").read_text())
    change(records)
    (folder / "mc.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        open_task("mc", task, replace(paths, data=str(tmp_path)), Profile.paper)


def test_all_bad_records_are_listed_at_once(cell: Cell, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "toy")
    (folder / "vqa.json").write_text(json.dumps([{"question": "?"}] * 3))
    with pytest.raises(DataError) as caught:
        open_task(
            "vqa", cell[0].suite.tasks["vqa"], replace(cell[0].paths, data=str(tmp_path)), Profile.paper
        )
    assert str(caught.value).count("no field answer") == 3


@pytest.mark.parametrize("broken", ["controls", "records", "weights"])
def test_user_mistakes_are_found_before_anything_is_written(cell: Cell, tmp_path: Path, broken: str) -> None:
    config, parent = cell
    expected: type[MorebenchError] = {"controls": ConfigError, "records": DataError, "weights": WeightsError}[
        broken
    ]
    if broken == "controls":
        recipe = replace(config.stage.evaluate, controls=["blnd"])
        config = replace(config, stage=replace(config.stage, evaluate=recipe))
    if broken == "records":
        config = replace(config, paths=replace(config.paths, data=str(tmp_path)))
    with pytest.raises(expected):
        evaluate(config, tmp_path, tmp_path if broken == "weights" else parent)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_format_of_another_family_is_found_before_an_item_is_asked(cell: Cell, tmp_path: Path) -> None:
    config, parent = cell
    other = replace(config, llm=replace(config.llm, chat_format="chatml"))
    with pytest.raises(ConfigError, match=r"'<\|im_start\|>', '<\|im_end\|>', '<\|endoftext\|>'\. Choose"):
        evaluate(other, tmp_path, parent)
    assert list(tmp_path.iterdir()) == []


def test_trained_parts_come_from_the_parent(cell: Cell, evaluated: Path, tmp_path: Path) -> None:
    config, _ = cell
    torch.manual_seed(2)
    parent = make_folder(tmp_path / "other")
    weights = {Part.vision: starting_weights(config)[Part.vision]}  # another, random LLM
    save_parts(
        build_mllm(config, weights, config.stage.evaluate.precision), [Part.projector, Part.llm], parent
    )
    evaluate(config, make_folder(tmp_path / "run"), parent)
    assert artefacts(tmp_path / "run") != artefacts(evaluated)
