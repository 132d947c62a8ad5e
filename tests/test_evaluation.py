"""A whole evaluation of a tiny cell: what it leaves, how it continues, what it refuses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_evaluation import CLASSES, NUM_ITEMS, artefacts, make_finetuned
from factories_training import with_trainer

from morebench.config.schema import Config, Part, Profile
from morebench.errors import ConfigError, DataError, FencedError, MorebenchError, WeightsError
from morebench.evaluation.asking import ask
from morebench.evaluation.chunks import plan_chunks
from morebench.evaluation.generate import Answer, Generator, Request
from morebench.evaluation.predictions import PredictionsFile
from morebench.evaluation.records import open_task
from morebench.evaluation.run import evaluate
from morebench.evaluation.sheets import open_sheets
from morebench.models.parts import build_mllm, save_parts
from morebench.models.weights import starting_weights
from morebench.reporting.results import scored_items

Cell = tuple[Config, Path]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return make_finetuned(tmp_path_factory.mktemp("cell"))


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def evaluated(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(cell[0], folder, cell[1])
    return folder


def test_leaves_predictions_and_scores_in_record_order(evaluated: Path) -> None:
    for name in CLASSES:
        for control in (None, "blind", "shuffled"):
            pairs = scored_items(evaluated, name, control)  # refuses two files that differ in order
            assert [line["id"] for line, _ in pairs] == [f"{name}{number}" for number in range(NUM_ITEMS)]
            assert {len(line["prompt_sha256"]) for line, _ in pairs} == {64}
            assert all(line["image"].endswith(".png") for line, _ in pairs)


def test_results_are_the_aggregates_of_the_scores(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    assert set(results) == {"profile", "tasks", "controls", "flips", "asked", "devices", "seconds"}
    assert set(results["tasks"]) == set(results["controls"]["blind"]) == set(CLASSES)
    scores = [item.score for _, item in scored_items(evaluated, "vqa")]
    assert results["tasks"]["vqa"]["n"] == NUM_ITEMS
    assert results["tasks"]["vqa"]["metrics"] == {"exact_match": sum(scores) / NUM_ITEMS}
    assert "f1" in results["tasks"]["pope"]["metrics"]


def test_the_image_changes_answers(evaluated: Path) -> None:
    texts = {
        control: [line["prediction"] for line, _ in scored_items(evaluated, "vqa", control)]
        for control in (None, "blind", "shuffled")
    }
    assert texts[None] != texts["blind"]
    assert texts[None] != texts["shuffled"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("appends", "cut"), [(0, 0), (4, 0), (9, 7)])
def test_a_killed_evaluation_continues_to_the_same_files(
    cell: Cell, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appends: int, cut: int
) -> None:
    """Dies after some writes, maybe between two of one chunk, the last line `cut` bytes short of its end."""
    config, parent = cell
    append, left = PredictionsFile.append, [appends]

    def fatal_append(self: PredictionsFile, lines: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        append(self, lines)
        if left[0] == 0 and cut:
            content = self._path.read_bytes()
            self._path.write_bytes(content[:-cut])

    generated = count_generated(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(PredictionsFile, "append", fatal_append)
        with pytest.raises(Killed):
            evaluate(config, tmp_path, parent)
    assert not (tmp_path / "results.json").exists()
    evaluate(config, tmp_path, parent)
    assert artefacts(tmp_path) == artefacts(evaluated)
    # the chunk that was being saved is answered again, and one more that lost a line
    num_chunks = len(plan_chunks(ask(config, open_sheets(config)).requests, batch_size=8))
    assert 0 < len(generated) - num_chunks <= (2 if cut else 1)


def test_an_evaluation_that_was_taken_over_writes_nothing_more(cell: Cell, tmp_path: Path) -> None:
    left = [2]

    def fence() -> None:
        if left[0] == 0:
            raise FencedError("taken")
        left[0] -= 1

    with pytest.raises(FencedError):
        evaluate(cell[0], tmp_path, cell[1], fence)
    assert 0 < sum(map(num_lines, (tmp_path / "predictions").iterdir())) <= 2 * 8
    assert {path.name for path in tmp_path.iterdir()} == {"predictions", "manifest.json"}


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def count_generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of every batch that is generated from now on."""
    real = Generator.answer
    sizes: list[int] = []

    def counted(self: Generator, requests: Sequence[Request], share: bool = True) -> list[Answer]:
        answers = real(self, requests, share)
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


def test_a_prediction_for_another_prompt_or_image_is_made_again(
    cell: Cell, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parent = cell
    lines = [json.loads(line) for line in (evaluated / "predictions" / "vqa.jsonl").read_text().splitlines()]
    lines[3] |= {"prompt_sha256": "0" * 64, "prediction": "stale"}
    lines[4] |= {"images_sha256": "0" * 64, "prediction": "stale"}
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
    asked = {0: {"prompt_sha256": "a"}}
    PredictionsFile(path, asked).append([line])
    for cut in range(1, len(path.read_bytes())):
        short = tmp_path / "predictions" / "short.jsonl"
        short.write_bytes(path.read_bytes()[:-cut])
        assert PredictionsFile(short, asked).lines in ({}, {0: line})
    assert PredictionsFile(path, asked).finish() == [line]
    for other in ("7", "[]", '{"id": 0}'):
        (tmp_path / "predictions" / "short.jsonl").write_text(f"{path.read_text()}{other}\n")
        assert PredictionsFile(tmp_path / "predictions" / "short.jsonl", asked).lines == {0: line}


@pytest.mark.parametrize("stale", ["prompt_sha256", "images_sha256"])
def test_a_line_about_something_else_is_dropped_and_nothing_is_written_before_an_append(
    tmp_path: Path, stale: str
) -> None:
    path = tmp_path / "predictions" / "vqa.jsonl"
    hashes = {"prompt_sha256": "a", "images_sha256": "b"}
    lines = [{"index": index, **hashes} for index in range(3)]
    PredictionsFile(path, dict.fromkeys(range(3), hashes)).append(lines)
    asked = {0: hashes, 1: {**hashes, stale: "c"}}
    before, file = path.read_bytes(), PredictionsFile(path, asked)
    assert (list(file.lines), file.num_missing, path.read_bytes()) == ([0], 1, before)
    file.append([{"index": 1, **asked[1]}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        lines[0],
        {"index": 1, **asked[1]},
    ]


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
