"""Tables, figures and a page from finished runs.

    python -m morebench.report experiments=digits

Takes the overrides of `python -m morebench.train -m`; writes reports/<experiment>/.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from morebench import entry
from morebench.config.compose import parse_overrides
from morebench.config.schema import AXES, Step
from morebench.errors import ConfigError
from morebench.matrix.cell import CHAIN
from morebench.matrix.plan import Plan
from morebench.plan import plan_of


def command(overrides: Sequence[str]) -> None:
    from morebench.reporting.report import write_report
    from morebench.reporting.tables import terminal_table

    plan = plan_of(overrides)
    files = write_report(_name(overrides), _rows(plan), _columns(plan), _folder(overrides, plan))
    console = Console()
    console.print(terminal_table(files.results))
    for path in files.paths:
        console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    entry.run(command, __doc__)
