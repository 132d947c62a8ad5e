"""Figures as inline SVG: text stays text, ink follows the page's colour scheme, a cell keeps its colour."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from math import pi
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from morebench.reporting.tables import FEW_COLUMNS, Row, Table, cell_name

# Okabe and Ito's set for colour-blind readers, less its yellow and black; a blue that shows on dark too.
COLOURS = ("#2680C2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C")
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#010203", "#040506"  # replaced by the page's own colours
MAX_POINTS = 300  # a curve of a long run is thinned to this
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Drawing:
    """`alt` says in words what the picture shows."""

    svg: str
    alt: str


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def scores_figure(table: Table) -> Drawing | None:
    """Bars for few columns, a radar for many; None while no cell is evaluated."""
    if not any(result.scores for result in table.results):
        return None
    return _bars(table) if len(table.columns) <= FEW_COLUMNS else _radar(table)


def loss_figure(title: str, table: Table, curves: Mapping[int, Mapping[int, float]]) -> Drawing | None:
    """`curves`: number of the cell -> optimizer step -> loss. Thin: as measured; thick: running mean."""
    if not curves:
        return None
    names = [cell_name(table, row) for row in _cell_rows(table)]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.subplots()
        ends: dict[int, float] = {}
        for number, curve in curves.items():
            steps, losses = _thinned(curve)
            smooth = _running_mean(losses, max(1, len(losses) // 25))
            dashes = DASHES[number // len(COLOURS) % len(DASHES)]
            axes.plot(steps, losses, color=colour(number), linewidth=0.7, alpha=0.3)
            axes.plot(steps, smooth, color=colour(number), linewidth=1.8, linestyle=dashes)
            ends[number] = float(smooth[-1])
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss per supervised token")
        axes.grid(axis="y")
        axes.margins(x=0.01)
        every = np.concatenate([_thinned(curve)[1] for curve in curves.values()])
        low, high = float(every.min()), float(np.percentile(every, 99.5))
        span = (high - low) or 1.0
        axes.set_ylim(max(0.0, low - 0.08 * span), high + 0.05 * span)
        _label_ends(axes, {number: (names[number], value) for number, value in ends.items()})
        alt = f"{title}: loss by optimizer step. Final running mean: " + "; ".join(
            f"{names[number]} {value:.3f}" for number, value in ends.items()
        )
        return Drawing(_svg(figure, f"loss-{title}"), alt)


def _bars(table: Table) -> Drawing:
    """A panel per column, a bar per cell on a shared axis with the cells' names; a tick is the control."""
    rows = _cell_rows(table)
    names = [cell_name(table, row) for row in rows]
    with rc_context(STYLE):
        figure = Figure(
            figsize=(1.9 + 2.5 * len(table.columns), 0.75 + 0.36 * len(rows)), layout="constrained"
        )
        panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
        for column, axes in zip(table.columns, panels, strict=True):
            full = max(
                100.0, *(r.scores[column.label].high for r in table.results if column.label in r.scores), 0.0
            )
            for number, result in enumerate(table.results):
                score = result.scores.get(column.label)
                if score is None:
                    axes.text(0.02 * full, number, "--", va="center")
                    continue
                axes.barh(number, score.value, height=0.62, color=colour(number))
                axes.plot([score.low, score.high], [number, number], color=INK, linewidth=1.3)
                axes.text(
                    score.high + 0.02 * full,
                    number,
                    f"{score.value:.{column.digits}f}",
                    va="center",
                    fontsize=9,
                )
                for name, control in result.controls.items():
                    if column.label in control:
                        value = control[column.label].value
                        axes.plot([value, value], [number - 0.31, number + 0.31], color=INK, linewidth=1.6)
                        if number == 0:
                            axes.text(value, -0.42, name, ha="center", va="bottom", fontsize=8)
            axes.set_title(column.label, pad=14)
            axes.set_xlim(0, 1.18 * full)
            axes.set_xticks(np.linspace(0, full, 5), [f"{tick:.0f}" for tick in np.linspace(0, full, 5)])
            axes.set_yticks(range(len(names)), names)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
        panels[0].invert_yaxis()
        return Drawing(_svg(figure, "bars"), _alt(table))


def _radar(table: Table) -> Drawing:
    """A spoke per column from a little below its lowest cell to its highest; it names both ends."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.6), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_offset(pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        columns = [c for c in table.columns if any(c.label in result.scores for result in table.results)]
        angles = np.linspace(0, 2 * pi, len(columns), endpoint=False)
        spans = {}
        for column in columns:
            values = [r.scores[column.label].value for r in table.results if column.label in r.scores]
            spans[column.label] = (min(values), max(values))
        for number, (row, result) in enumerate(zip(_cell_rows(table), table.results, strict=True)):
            points = [
                (angle, _relative(result.scores[column.label].value, spans[column.label]))
                for angle, column in zip(angles, columns, strict=True)
                if column.label in result.scores
            ]
            if points:
                closed = np.array([*points, points[0]])
                dashes = DASHES[number // len(COLOURS) % len(DASHES)]
                axes.plot(
                    *closed.T,
                    color=colour(number),
                    linewidth=1.8,
                    linestyle=dashes,
                    label=cell_name(table, row),
                )
        ends = [
            "{}\n{:.{d}f}\N{EN DASH}{:.{d}f}".format(column.label, *spans[column.label], d=column.digits)
            for column in columns
        ]
        axes.set_xticks(angles, ends)
        axes.tick_params(axis="x", pad=12)
        axes.set_yticks([0.25, 1.0], [])
        axes.set_ylim(0, 1.05)
        figure.legend(loc="outside right upper", frameon=False)
        return Drawing(_svg(figure, "radar"), _alt(table))


def _relative(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return 0.25 + 0.75 * (value - low) / (high - low) if high > low else 1.0


def _cell_rows(table: Table) -> list[Row]:
    return [row for row in table.rows if not row.control]


def _alt(table: Table) -> str:
    said = []
    for row in _cell_rows(table):
        values = (f"{c.label} {p.text}" for c, p in zip(table.columns, row.printed, strict=True))
        said.append(f"{cell_name(table, row)}: {', '.join(values)}")
    return "Scores by cell. " + "; ".join(said)


def _thinned(curve: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over blocks of steps, at most MAX_POINTS of them."""
    steps = np.array(sorted(curve))
    losses = np.array([curve[step] for step in steps])
    blocks = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    return np.array([steps[b].mean() for b in blocks]), np.array([losses[b].mean() for b in blocks])


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Centred over up to `reach` neighbours on each side; fewer near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _label_ends(axes: Axes, ends: Mapping[int, tuple[str, float]]) -> None:
    """Names at the curves' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    order = sorted(ends, key=lambda number: ends[number][1])
    heights: list[float] = []
    for number in order:
        heights.append(max(ends[number][1], heights[-1] + gap if heights else low))
    for number, height in zip(order, heights, strict=True):
        axes.annotate(
            ends[number][0],
            (1.01, height),
            xycoords=("axes fraction", "data"),
            color=colour(number),
            va="center",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )


def _svg(figure: Figure, salt: str) -> str:
    """SVG for the inside of an HTML page: no prologue, no names that reach outside, ids unique by `salt`."""
    out = StringIO()
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace("'DejaVu Sans'", "system-ui, sans-serif")
    svg = re.sub(r'id="([^"#]+)"', lambda m: f'id="{_id(salt)}-{m[1]}"', svg)
    svg = re.sub(r'(href="#|url\(#)', lambda m: f"{m[1]}{_id(salt)}-", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)


def _id(salt: str) -> str:
    return re.sub(r"\W+", "-", salt.lower())
