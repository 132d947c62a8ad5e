"""Results -> one table, printed as Markdown, LaTeX, CSV, JSON or in the terminal."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from morebench.config.schema import AXES, Column
from morebench.reporting.results import CellResult, Score

MISSING = "--"
FEW_COLUMNS = 6  # what fits beside each other with intervals
AXIS_TITLES = {
    "llm": "LLM",
    "vision": "Vision encoder",
    "resolution": "Resolution",
    "pretrain_data": "Pre-training data",
    "seed": "Seed",
}


@dataclass(frozen=True)
class Printed:
    """One number of the table. `rank`: 1 the column's best, 2 its second, 0 neither."""

    text: str
    low: str = ""
    high: str = ""
    rank: int = 0

    @property
    def interval(self) -> str:
        return f"{self.low}\N{EN DASH}{self.high}" if self.low else ""


@dataclass(frozen=True)
class Row:
    """`control` is empty for a cell's own row, else the name of the control."""

    result: CellResult
    names: tuple[str, ...]  # one per axis of the table
    control: str
    printed: tuple[Printed, ...]  # one per column


@dataclass(frozen=True)
class Table:
    name: str
    axes: tuple[str, ...]  # axes that have a column of their own
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    fixed: str  # what all rows share
    notes: tuple[str, ...]

    @property
    def results(self) -> list[CellResult]:
        return [row.result for row in self.rows if not row.control]

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(AXIS_TITLES[axis] for axis in self.axes) + tuple(column.label for column in self.columns)


def make_table(
    name: str, results: Sequence[CellResult], columns: Sequence[Column], notes: Sequence[str]
) -> Table:
    """Axes with one choice throughout are said once, not in each row; LLM and vision encoder always stand."""
    labels = [{**result.row.labels, "seed": str(result.row.seed)} for result in results]
    varying = [axis for axis in (*AXES, "seed") if len({label[axis] for label in labels}) > 1]
    axes = tuple(axis for axis in (*AXES, "seed") if axis in varying or axis in ("llm", "vision"))
    fixed = "; ".join(
        f"{AXIS_TITLES[axis]}: {labels[0][axis]}" for axis in (*AXES, "seed") if axis not in axes
    )
    ranks = [_ranks(results, column) for column in columns]
    rows = []
    for i, (result, label) in enumerate(zip(results, labels, strict=True)):
        names = tuple(label[axis] for axis in axes)
        printed = [_print(result.scores.get(c.label), c, ranks[k][i]) for k, c in enumerate(columns)]
        rows.append(Row(result, names, "", tuple(printed)))
        for control, scores in result.controls.items():
            rows.append(
                Row(result, names, control, tuple(_print(scores.get(c.label), c, 0) for c in columns))
            )
    return Table(name, axes, tuple(columns), tuple(rows), fixed, tuple(notes))


def cell_name(table: Table, row: Row) -> str:
    return " + ".join(
        f"seed {name}" if axis == "seed" else name for axis, name in zip(table.axes, row.names, strict=True)
    )


def markdown(table: Table) -> str:
    lines = [f"# {table.name}", ""]
    if table.fixed:
        lines += [f"{table.fixed}.", ""]
    alignment = ["---"] * len(table.axes) + ["---:"] * len(table.columns)
    lines += [_markdown_line(table.header), _markdown_line(alignment)]
    for row in table.rows:
        if row.control:
            first = f"*\N{RIGHTWARDS ARROW WITH HOOK} {row.control}*"
            names: tuple[str, ...] = (first, *("" for _ in row.names[1:]))
        else:
            names = tuple(name.replace("|", "\\|") for name in row.names)
        lines.append(_markdown_line([*names, *(_markdown_number(printed) for printed in row.printed)]))
    lines += ["", "**Best** and <u>second</u> of each column; small print: 95 % interval.", ""]
    lines += [f"- {note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """Axis choices as in the config; numbers with the column's factor, two decimals more than printed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *AXES, "seed", "control", *(column.label for column in table.columns)])
    for row in table.rows:
        scores = row.result.controls[row.control] if row.control else row.result.scores
        numbers = [
            f"{scores[c.label].value:.{c.digits + 2}f}" if c.label in scores else MISSING
            for c in table.columns
        ]
        choices = [row.result.row.cell[axis] for axis in AXES]
        writer.writerow([row.result.run or MISSING, *choices, row.result.row.seed, row.control, *numbers])
    return out.getvalue()


def json_text(table: Table) -> str:
    """Everything the other formats show and what they have no room for."""
    rows = []
    for result in table.results:
        rows.append(
            {
                "cell": dict(result.row.cell),
                "labels": dict(result.row.labels),
                "seed": result.row.seed,
                "runs": result.run_ids,
                "evaluated": result.evaluated,
                "profile": result.profile,
                "scores": {label: asdict(score) for label, score in result.scores.items()},
                "controls": {
                    name: {label: asdict(score) for label, score in scores.items()}
                    for name, scores in result.controls.items()
                },
                "costs": {step: asdict(cost) for step, cost in result.costs.items()},
                "exclusions": result.exclusions,
                "anomalies": list(result.anomalies),
                "num_answers": result.num_answers,
                "odd_answers": result.odd_answers,
                "warnings": list(result.warnings),
                "commits": list(result.commits),
            }
        )
    columns = [asdict(column) for column in table.columns]
    whole = {"name": table.name, "columns": columns, "rows": rows, "notes": list(table.notes)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def terminal_table(table: Table) -> TerminalTable:
    """Intervals stand in the terminal while they fit; the files always have them."""
    shown = TerminalTable(title=table.name, caption=table.fixed or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for axis in table.axes:
        shown.add_column(AXIS_TITLES[axis], no_wrap=True)
    for column in table.columns:
        shown.add_column(column.label, justify="right", no_wrap=True)
    with_intervals = len(table.columns) <= 5
    for row in table.rows:
        names = (f"  {row.control}", *("" for _ in row.names[1:])) if row.control else row.names
        cells = [Text(name, style="dim" if row.control else "") for name in names]
        shown.add_row(
            *cells, *(_terminal_number(printed, row.control, with_intervals) for printed in row.printed)
        )
    return shown


def _print(score: Score | None, column: Column, rank: int) -> Printed:
    if score is None:
        return Printed(MISSING)
    value, low, high = (f"{number:.{column.digits}f}" for number in (score.value, score.low, score.high))
    return Printed(value, low, high, rank)


def _ranks(results: Sequence[CellResult], column: Column) -> list[int]:
    """Ranks by the number as printed: what looks equal is equal. One cell alone wins nothing."""
    values = [
        round(r.scores[column.label].value, column.digits) if column.label in r.scores else None
        for r in results
    ]
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return [0] * len(values)
    leaders = sorted(set(present), reverse=True)[:2]
    return [leaders.index(value) + 1 if value in leaders else 0 for value in values]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_number(printed: Printed) -> str:
    text = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}[printed.rank].format(printed.text)
    return f"{text} <sub>{printed.interval}</sub>" if printed.interval else text


def _terminal_number(printed: Printed, control: str, with_interval: bool) -> Text:
    style = "dim" if control else {0: "", 1: "bold", 2: "underline"}[printed.rank]
    text = Text(printed.text, style=style)
    if with_interval and printed.interval:
        text.append(f"\n{printed.interval}", style="dim")
    return text
