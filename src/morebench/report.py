"""Tables, figures and a page from finished runs.

    python -m morebench.report experiments=digits

Takes the overrides of `python -m morebench.train -m`; writes reports/<experiment>/.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from morebench import entry
from morebench.config.schema import AXES
from morebench.errors import ConfigError
from morebench.matrix.cell import CHAIN
from morebench.matrix.ledger import State
from morebench.matrix.plan import Plan
from morebench.plan import plan_of
from morebench.reporting.results import ReportRow


def command(overrides: Sequence[str]) -> None:
    from morebench.reporting.report import write_report
    from morebench.reporting.tables import terminal_table

    plan = plan_of(overrides)
    config = plan.cells[0].config
    name = report_name(plan)
    folder = Path(config.paths.reports) / name
    files = write_report(name, rows(plan), config.suite.columns, folder)
    console = Console()
    console.print(terminal_table(files.table))
    for path in files.paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def report_name(plan: Plan) -> str:
    """The experiments the cells come from, or `cells`; refuses cells of different suites in one table."""
    suites = {cell.choices["suite"] for cell in plan.cells}
    if len(suites) > 1:
        raise ConfigError(
            f"One table has one set of columns, found suites {sorted(suites)}. Report them apart."
        )
    names = dict.fromkeys(cell.config.experiments for cell in plan.cells if cell.config.experiments)
    return "-".join(names) or "cells"


def rows(plan: Plan) -> list[ReportRow]:
    return [
        ReportRow(
            cell={axis: cell.choices[axis] for axis in AXES},
            labels={axis: getattr(cell.config, axis).label for axis in AXES},
            seed=cell.config.seed,
            runs={
                step.name: plan.runs[ids[step]].folder
                if step in ids and plan.runs[ids[step]].state is State.done
                else None
                for step in CHAIN  # a step that this chain has not is one whose cost is not known
            },
        )
        for cell, ids in zip(plan.cells, plan.ids, strict=True)
    ]


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
