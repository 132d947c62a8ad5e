"""The report as one self-contained HTML page: no script, no request, readable without colour or screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from morebench.config.schema import Column
from morebench.reporting.costs import CAPTION, QUANTITIES, TRAIN_STEPS, compared
from morebench.reporting.figures import Drawing, colour, loss_figure, scores_figure
from morebench.reporting.gallery import TaskExamples, cell_examples
from morebench.reporting.results import CellResult, loss_curve
from morebench.reporting.tables import (
    AXIS_TITLES,
    FEW_COLUMNS,
    MISSING,
    Table,
    cell_name,
)


@dataclass(frozen=True)
class Leader:
    """The best cell of a column, and how far it is above its control."""

    column: str
    value: str
    interval: str
    cell: str
    number: int
    above: str


@dataclass(frozen=True)
class CellView:
    number: int
    name: str
    colour: str
    result: CellResult
    examples: list[TaskExamples]
    cost: dict[str, str]
    speeds: dict[str, str]  # train step -> tokens/s


def page(table: Table) -> str:
    environment = Environment(
        loader=PackageLoader("morebench.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.j2").render(
        table=table,
        axis_titles=AXIS_TITLES,
        few=len(table.columns) <= FEW_COLUMNS,
        leaders=_leaders(table) if len(table.columns) <= FEW_COLUMNS else [],
        cells=_cells(table),
        compared=compared(table),
        compared_caption=CAPTION,
        quantities=QUANTITIES,
        scores=_safe(scores_figure(table)),
        losses=[drawing for step in TRAIN_STEPS if (drawing := _safe(_losses(table, step)))],
    )


def _safe(drawing: Drawing | None) -> dict[str, Any] | None:
    return (
        {"svg": Markup(drawing.svg), "alt": drawing.alt} if drawing else None
    )  # our own SVG, text escaped in it


def _losses(table: Table, step: str) -> Drawing | None:
    folders = {number: result.row.runs.get(step) for number, result in enumerate(table.results)}
    curves = {number: curve for number, folder in folders.items() if folder and (curve := loss_curve(folder))}
    return loss_figure(step, table, curves)


def _leaders(table: Table) -> list[Leader]:
    leaders = []
    rows = [row for row in table.rows if not row.control]
    for k, column in enumerate(table.columns):
        for number, row in enumerate(rows):
            printed = row.printed[k]
            if printed.rank == 1:
                leaders.append(
                    Leader(
                        column.label,
                        printed.text,
                        printed.interval,
                        cell_name(table, row),
                        number,
                        _above_control(row.result, column),
                    )
                )
                break
    return leaders


def _above_control(result: CellResult, column: Column) -> str:
    return ", ".join(
        f"{result.scores[column.label].value - scores[column.label].value:+.{column.digits}f} over {name}"
        for name, scores in result.controls.items()
        if column.label in scores
    )


def _cells(table: Table) -> list[CellView]:
    rows = [row for row in table.rows if not row.control]
    return [
        CellView(
            number=number,
            name=cell_name(table, row),
            colour=colour(number),
            result=row.result,
            examples=cell_examples(row.result, table.columns) if row.result.evaluated else [],
            cost=_cost(row.result),
            speeds=_speeds(row.result),
        )
        for number, row in enumerate(rows)
    ]


def _cost(result: CellResult) -> dict[str, str]:
    """Printed cost: wall time by step, then the totals. A total needs every step's."""
    costs = [result.costs.get(step) for step in result.row.runs]
    seconds = [cost.seconds if cost else None for cost in costs]
    hours = [cost.gpu_hours if cost else None for cost in costs]
    walls = {step: _wall(value) for step, value in zip(result.row.runs, seconds, strict=True)}
    return {**walls, "total": _wall(_sum(seconds)), "gpu_hours": _hours(_sum(hours))}


def _sum(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def _speeds(result: CellResult) -> dict[str, str]:
    costs = {step: result.costs.get(step) for step in TRAIN_STEPS}
    return {step: f"{c.tokens_per_s:,.0f}" if c and c.tokens_per_s else MISSING for step, c in costs.items()}


def _wall(seconds: float | None) -> str:
    return MISSING if seconds is None else str(timedelta(seconds=round(seconds)))


def _hours(hours: float | None) -> str:
    return MISSING if hours is None else f"{hours:,.2f}"
