import json
import subprocess
import sys
from pathlib import Path

import pytest
from factories_reporting import columns, four_cells, write_json

from morebench.errors import RunError
from morebench.reporting.notes import footnotes
from morebench.reporting.results import ReportRow, load_results, loss_curve, scored_items


@pytest.fixture
def rows(tmp_path: Path) -> list[ReportRow]:
    return four_cells(tmp_path, num_images=12)


def evaluate_folder_of(row: ReportRow) -> Path:
    folder = row.runs["evaluate"]
    assert folder is not None
    return folder


def edit(path: Path, **fields: object) -> None:
    write_json(path, {**json.loads(path.read_text()), **fields})


def test_scores_are_the_results_in_the_columns_unit_with_n_and_interval(rows: list[ReportRow]):
    results = load_results(rows, columns())
    assert [result.row for result in results] == rows
    for row, result in zip(rows, results, strict=True):
        folder = evaluate_folder_of(row)
        written = json.loads((folder / "results.json").read_text())
        assert result.run == folder.name
        for column in columns():
            score = result.scores[column.label]
            of_task = written["tasks"][column.task]
            assert score.value == pytest.approx(100 * of_task["metrics"][column.metric])
            assert score.n == of_task["n"]
            assert 0 <= score.low <= score.value <= score.high <= 100
            assert score.low < score.high
        blind = written["controls"]["blind"]["digits_mc"]["metrics"]["exact_match"]
        assert result.controls["blind"]["digits_mc"].value == pytest.approx(100 * blind)


def test_costs_and_curves_come_from_the_run_folders(rows: list[ReportRow]):
    result = load_results(rows, columns())[1]
    assert {step: cost.seconds for step, cost in result.costs.items()} == {
        "pretrain": 18.0,
        "finetune": 18.0,
        "evaluate": 12.3,
    }
    assert result.costs["pretrain"].tokens_per_s == pytest.approx(9000, abs=100)
    assert result.costs["evaluate"].tokens_per_s is None
    folder = rows[0].runs["pretrain"]
    assert folder is not None
    assert list(loss_curve(folder)) == list(range(187))


def test_a_cell_without_a_finished_evaluate_run_has_no_scores(rows: list[ReportRow]):
    (evaluate_folder_of(rows[0]) / "DONE").unlink()
    unfinished = [rows[0], ReportRow(rows[1].cell, rows[1].labels, 0, {**rows[1].runs, "evaluate": None})]
    for result in load_results(unfinished, columns()):
        assert not result.evaluated
        assert result.scores == result.controls == {}
        assert set(result.costs) == {"pretrain", "finetune"}


def test_a_task_that_was_not_run_is_missing_not_zero(rows: list[ReportRow]):
    path = evaluate_folder_of(rows[0]) / "results.json"
    tasks = json.loads(path.read_text())["tasks"]
    del tasks["digits_mc"]
    edit(path, tasks=tasks)
    assert set(load_results(rows[:1], columns())[0].scores) == {"digits_vqa", "digits_pope"}


def test_a_number_its_items_deny_is_refused(rows: list[ReportRow]):
    path = evaluate_folder_of(rows[0]) / "results.json"
    tasks = json.loads(path.read_text())["tasks"]
    tasks["digits_pope"]["metrics"]["f1"] += 0.01
    edit(path, tasks=tasks)
    with pytest.raises(
        RunError, match=r"results\.json says f1 = .* over 24 items of digits_pope, but .*gives"
    ):
        load_results(rows, columns())


def test_scores_cut_short_are_refused(rows: list[ReportRow]):
    path = evaluate_folder_of(rows[0]) / "scores" / "digits_vqa.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match=r"must list the same items in order \(24 and 23 lines\)"):
        load_results(rows, columns())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", "{", r"results\.json must be JSON"),
        ("scores/digits_vqa.jsonl", '{"id": 1}\n{', r"digits_vqa\.jsonl, line 2, must be JSON"),
    ],
)
def test_damaged_files_are_named(rows: list[ReportRow], file: str, text: str, message: str):
    (evaluate_folder_of(rows[0]) / file).write_text(text)
    with pytest.raises(RunError, match=message):
        load_results(rows, columns())


def test_missing_predictions_are_named(rows: list[ReportRow]):
    (evaluate_folder_of(rows[0]) / "predictions" / "digits_mc.blind.jsonl").unlink()
    with pytest.raises(RunError, match=r"digits_mc\.blind\.jsonl must be there"):
        load_results(rows, columns())


def test_scored_items_pair_predictions_with_their_scores(rows: list[ReportRow]):
    pairs = scored_items(evaluate_folder_of(rows[0]), "digits_vqa")
    assert len(pairs) == 24
    assert all((line["prediction"] == line["target"]) == (item.score == 1.0) for line, item in pairs)


def test_footnotes_are_what_the_manifests_say(rows: list[ReportRow]):
    for row in rows:
        finetune = row.runs["finetune"]
        assert finetune is not None
        edit(finetune / "manifest.json", quarantined=2)
    pretrain = rows[1].runs["pretrain"]
    assert pretrain is not None
    edit(
        pretrain / "manifest.json",
        truncated=1234,
        unsupervised=0,
        anomalies=["resumed on another world size: not bit-exact"],
        git={"commit": "f" * 40, "diff_sha256": "a"},
    )
    notes = footnotes(load_results(rows, columns()))
    assert "Prompts and scorers: profile paper." in notes
    assert "finetune: 2 records quarantined, their image or text being unusable (every row)." in notes
    assert "pretrain: 1,234 samples cut at the maximum length (Gemma-2-tiny + SigLIP-tiny)." in notes
    assert (
        "Anomaly, pretrain: resumed on another world size: not bit-exact (Gemma-2-tiny + SigLIP-tiny)."
        in notes
    )
    assert "Runs of 2 commits: 0123456789ab, ffffffffffff with uncommitted changes." in notes
    assert not any("supervised token" in note for note in notes)


def test_rows_of_different_profiles_are_called_out(rows: list[ReportRow]):
    edit(evaluate_folder_of(rows[3]) / "results.json", profile="lmms_eval_0_7_3")
    warning = next(note for note in footnotes(load_results(rows, columns())) if note.startswith("WARNING"))
    assert "lmms_eval_0_7_3: Llama-tiny + SigLIP-tiny" in warning


def test_reporting_needs_no_torch():
    code = (
        "import sys, morebench.reporting.report; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_footnotes_cite_the_answers_that_scores_say_nothing_about(rows: list[ReportRow]):
    path = evaluate_folder_of(rows[0]) / "results.json"
    whole = path.read_text()
    written = json.loads(whole)
    for number, task in enumerate(written["tasks"].values(), 1):
        task["anomalies"] = {"empty": {"n": number, "examples": []}}
    written["tasks"]["digits_mc"]["warnings"] = ["the score depends on judge=none."]
    path.write_text(json.dumps(written))
    try:
        result, *_ = found = load_results(rows, columns())
        notes = footnotes(found)
    finally:
        path.write_text(whole)
    total = sum(task["n"] for task in written["tasks"].values())
    (empty,) = [note for note in notes if note.startswith("Answers that are empty (no text): 6 of ")]
    assert f"6 of {total:,} ({result.row.labels['llm']} + {result.row.labels['vision']})." in empty
    assert any(note.startswith("WARNING: digits_mc: the score depends on judge=none. (") for note in notes)
    assert "How much of a score needs the image is its distance from a control." in notes
