"""Predicted against measured cost of the steps, run by run."""

from collections.abc import Iterator
from dataclasses import dataclass

from morebench.config.schema import Step
from morebench.reporting.tables import MISSING, Table, cell_name

TRAIN_STEPS = (Step.pretrain.value, Step.finetune.value)
QUANTITIES = ("PFLOP", "hours", "GiB a rank")
CAPTION = (
    "Predicted before the first start, from shapes, token lengths and conf/gpus; measured: the run's own "
    "telemetry, hours from first start to end. A run that several cells share stands once."
)


@dataclass(frozen=True)
class Compared:
    """`texts`: predicted, measured and measured / predicted of each of QUANTITIES."""

    cell: str
    step: str
    texts: tuple[str, ...]


def compared(table: Table) -> list[Compared]:
    """Of finished runs that were predicted or measured in something."""
    found: dict[str, Compared] = {}
    for row in table.rows:
        for step in () if row.control else (*TRAIN_STEPS, Step.evaluate.value):
            cost = row.result.costs.get(step)
            if cost is None:
                continue
            predicted = cost.predicted
            pairs = (
                (_scaled(predicted.flops, 1e-15), _scaled(cost.flops, 1e-15)),
                (_scaled(predicted.seconds, 1 / 3600), _scaled(cost.seconds, 1 / 3600)),
                (predicted.memory_gib, cost.memory_gib),
            )
            texts = tuple(text for pair in pairs for text in _texts(*pair))
            if any(value is not None for value in (predicted.flops, predicted.seconds, predicted.memory_gib)):
                found.setdefault(row.result.run_ids[step], Compared(cell_name(table, row), step, texts))
    return list(found.values())


def costs_markdown(table: Table) -> str:
    """Empty where nothing was predicted."""
    rows = compared(table)
    if not rows:
        return ""
    titles = [f"{name} {kind}" for name in QUANTITIES for kind in ("predicted", "measured", "ratio")]
    lines = ["", "## Cost", "", CAPTION, ""]
    lines += [_line(["Cell", "Step", *titles]), _line(["---", "---", *["---:"] * len(titles)])]
    lines += [_line([row.cell.replace("|", "\\|"), row.step, *row.texts]) for row in rows]
    return "\n".join(lines) + "\n"


def _texts(predicted: float | None, measured: float | None) -> Iterator[str]:
    yield _number(predicted)
    yield _number(measured)
    yield MISSING if not predicted or measured is None else f"{measured / predicted:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
