"""The folder of one report: the same table in five formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from morebench.config.schema import Column
from morebench.reporting.costs import costs_markdown
from morebench.reporting.latex import latex
from morebench.reporting.notes import footnotes
from morebench.reporting.page import page
from morebench.reporting.results import ReportRow, load_results
from morebench.reporting.tables import Table, csv_text, json_text, make_table, markdown


@dataclass(frozen=True)
class ReportFiles:
    table: Table  # for `tables.terminal_table`
    paths: tuple[Path, ...]


def write_report(
    name: str, rows: Sequence[ReportRow], columns: Sequence[Column], folder: Path
) -> ReportFiles:
    """Write every format into `folder`. Raises RunError if a finished run's files contradict each other."""
    results = load_results(rows, columns)
    table = make_table(name, results, columns, footnotes(results))
    texts = {
        "table.md": markdown(table) + costs_markdown(table),
        "table.tex": latex(table),
        "table.csv": csv_text(table),
        "table.json": json_text(table),
        "index.html": page(table),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return ReportFiles(table, tuple(folder / file for file in texts))
