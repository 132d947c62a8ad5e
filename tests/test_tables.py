import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from factories_reporting import columns, four_cells
from rich.console import Console

from morebench.config.schema import AXES, Column
from morebench.reporting.latex import escape, latex
from morebench.reporting.results import CellResult, ReportRow, Score, load_results
from morebench.reporting.tables import (
    Table,
    cell_name,
    csv_text,
    json_text,
    make_table,
    markdown,
    terminal_table,
)

GQA = Column(label="GQA", task="gqa", metric="exact_match", factor=100, digits=1)
MME = Column(label="MME-P", task="mme", metric="mme_perception_score", factor=1, digits=0)


def cell(number: int, scores: dict[str, float], blind: dict[str, float] | None = None) -> CellResult:
    choices = dict(zip(AXES, (f"llm_{number}", "clip", "native", "lcs"), strict=True))
    labels = {**choices, "llm": f"LLM {number}"}
    return CellResult(
        row=ReportRow(choices, labels, 0, {}),
        run_ids={"evaluate": f"run-{number}"} if scores else {},
        evaluated=bool(scores),
        scores={label: Score(value, value - 1, value + 1, 500) for label, value in scores.items()},
        controls={"blind": {label: Score(v, v - 1, v + 1, 500) for label, v in blind.items()}}
        if blind
        else {},
    )


def small_table() -> Table:
    """GQA: best 62.4 (twice, as printed), second 61.0. MME-P: best 1510, second 1401."""
    results = [
        cell(0, {"GQA": 62.41, "MME-P": 1401.2}, blind={"GQA": 99.0, "MME-P": 1999.0}),
        cell(1, {"GQA": 62.38, "MME-P": 1510.4}),
        cell(2, {"GQA": 61.0}),
        cell(3, {}),
    ]
    return make_table("t", results, [GQA, MME], ["a note"])


@pytest.fixture(scope="module")
def digits_table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    results = load_results(
        four_cells(tmp_path_factory.mktemp("runs"), unfinished=[2], num_images=12), columns()
    )
    return make_table("digits", results, columns(), ["a note"])


def test_best_and_second_by_hand():
    ranks = [[printed.rank for printed in row.printed] for row in small_table().rows if not row.control]
    assert ranks == [[1, 2], [1, 1], [2, 0], [0, 0]]


def test_controls_never_win():
    blind = next(row for row in small_table().rows if row.control)
    assert [printed.rank for printed in blind.printed] == [0, 0]
    assert blind.printed[0].text == "99.0"


def test_one_cell_alone_wins_nothing():
    table = make_table("t", [cell(0, {"GQA": 62.4}), cell(1, {})], [GQA], [])
    assert [row.printed[0].rank for row in table.rows] == [0, 0]


def test_missing_is_two_dashes_everywhere():
    table = small_table()
    assert "| LLM 3 | clip | -- | -- |" in markdown(table).splitlines()
    assert csv_text(table).splitlines()[-1] == "--,llm_3,clip,native,lcs,0,,--,--"
    assert "LLM 3 & clip & -- & -- \\\\" in latex(table)
    assert json.loads(json_text(table))["rows"][3]["scores"] == {}


def test_markdown_marks_best_second_and_interval():
    lines, to = markdown(small_table()).splitlines(), "\N{EN DASH}"
    assert (
        lines[4] == "| LLM | Vision encoder | GQA | MME-P |"
        or "| LLM | Vision encoder | GQA | MME-P |" in lines
    )
    assert (
        f"| LLM 0 | clip | **62.4** <sub>61.4{to}63.4</sub> | <u>1401</u> <sub>1400{to}1402</sub> |" in lines
    )
    assert f"| *↪ blind* |  | 99.0 <sub>98.0{to}100.0</sub> | 1999 <sub>1998{to}2000</sub> |" in lines
    assert "- a note" in lines


def test_csv_has_a_row_per_cell_and_per_control(digits_table: Table):
    rows = list(csv.DictReader(io.StringIO(csv_text(digits_table))))
    header = "run,llm,vision,resolution,pretrain_data,seed,control,digits_vqa,digits_pope,digits_mc"
    assert csv_text(digits_table).splitlines()[0] == header
    assert [row["control"] for row in rows] == ["", "blind", "", "blind", "", "", "blind"]
    assert [row["llm"] for row in rows] == ["gemma2_tiny"] * 4 + ["llama_tiny"] * 3
    assert rows[0]["run"] == rows[1]["run"] == "gemma2_tiny-clip_tiny-evaluate"
    score = digits_table.results[0].scores["digits_pope"]
    assert float(rows[0]["digits_pope"]) == pytest.approx(score.value, abs=1e-3)
    assert rows[4]["digits_pope"] == "--"


def test_json_holds_intervals_n_costs_and_run_ids(digits_table: Table):
    whole = json.loads(json_text(digits_table))
    first, third = whole["rows"][0], whole["rows"][2]
    assert set(first["scores"]["digits_vqa"]) == {"value", "low", "high", "n"}
    assert first["controls"]["blind"]["digits_vqa"]["n"] == 24
    assert first["costs"]["finetune"]["seconds"] == 17.0
    assert first["runs"]["pretrain"] == "gemma2_tiny-clip_tiny-pretrain"
    assert first["profile"] == "paper"
    assert third["evaluated"] is False


def test_axes_with_one_choice_are_said_once(digits_table: Table):
    assert digits_table.header[:2] == ("LLM", "Vision encoder")
    assert digits_table.fixed == "Resolution: native; Pre-training data: Digits captions; Seed: 0"
    assert cell_name(digits_table, digits_table.rows[0]) == "Gemma-2-tiny + CLIP-tiny"


def test_seeds_that_differ_get_a_column():
    results = [cell(0, {"GQA": 1.0}), cell(0, {"GQA": 2.0})]
    second = results[1]
    results[1] = CellResult(
        ReportRow(second.row.cell, second.row.labels, 1, {}), second.run_ids, True, scores=second.scores
    )
    table = make_table("t", results, [GQA], [])
    assert table.header == ("LLM", "Vision encoder", "Seed", "GQA")
    assert [row.names[2] for row in table.rows] == ["0", "1"]


def test_terminal_table_prints_every_row_with_intervals(digits_table: Table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(digits_table))
    text = console.export_text()
    assert text.count("blind") == 3
    assert "Gemma-2-tiny" in text
    best = digits_table.rows[0].printed[0]
    assert best.text in text
    assert best.interval in text


def test_latex_is_a_booktabs_table_with_as_many_cells_as_columns():
    text = latex(small_table())
    body = re.findall(r"^    (.* & .*) \\\\$", text, flags=re.MULTILINE)
    assert {line.count(" & ") for line in body} == {3}
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    assert r"LLM 0 & clip & \textbf{62.4} & \underline{1401} \\" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"items &  & 500 & 500 \\" in text
    assert r"$\pm$1.0 & $\pm$1 \\" in text


def test_latex_bounds_a_column_by_the_longer_side_of_an_interval():
    table = small_table()
    table.results[0].scores[table.columns[0].label] = Score(62.4, 61.4, 65.4, 500)
    assert r"$\pm$3.0 & $\pm$1 \\" in latex(table)


def test_latex_escapes_what_labels_may_hold():
    assert escape("a_b & 50% S² {x} $1 #2") == r"a\_b \& 50\% S\textsuperscript{2} \{x\} \$1 \#2"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX here; the structure is tested above")
def test_latex_compiles(digits_table: Table, tmp_path: Path):
    (tmp_path / "table.tex").write_text(latex(digits_table), encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (tmp_path / "document.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-2000:]
    assert b"Overfull" not in done.stdout
