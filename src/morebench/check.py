"""Does an LLM, a vision encoder and a resolution fit together, and what does a sample cost?

    python -m morebench.check llm=gemma2_9b vision=siglip2 resolution=s2
    python -m morebench.check llm=gemma2_2b,phi4 vision=clip,siglip table=sizes.md

Takes the overrides of `python -m morebench.train -m` (also `--config-dir DIR`, for choices of your own).
Reads what is on this machine and downloads nothing: without weights, shapes are checked and what needs a
tokenizer is skipped. Exits with 2 if anything failed. `table=FILE.md` instead writes one row a cell: tokens,
widths, parameters, FLOPs and memory.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from morebench import entry
from morebench.config.assemble import assemble
from morebench.config.compose import Composed, parse_overrides
from morebench.config.experiments import expand
from morebench.config.overrides import check
from morebench.config.schema import AXES
from morebench.conformance.findings import Finding, Verdict
from morebench.errors import EXIT_DONE, EXIT_USER, ConfigError
from morebench.matrix.cell import cell_of
from morebench.matrix.plan import check_cells

_WIDTH = 120  # of a report that goes into a file
_STYLE = {
    Verdict.ok: "green",
    Verdict.failed: "bold red",
    Verdict.skipped: "yellow",
    Verdict.shown: "default",
}


def command(overrides: Sequence[str]) -> int:
    cells_overrides, table = _split_table(overrides)
    check(cells_overrides)
    cells = assemble(expand(cells_overrides))
    check_cells([cell_of(cell) for cell in cells])
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if table is not None:
        from morebench.conformance.sizes import write_table

        write_table(cells, table, f"python -m morebench.check {' '.join(overrides)}")
        print(f"{table}: {len(cells)} rows")
        return EXIT_DONE
    has_failed = [_report(cell) for cell in cells]
    return EXIT_USER if any(has_failed) else EXIT_DONE


def _split_table(overrides: Sequence[str]) -> tuple[list[str], Path | None]:
    rest = [text for text in overrides if not text.startswith("table=")]
    tables = [override.values for override in parse_overrides(overrides) if override.key == "table"]
    if not tables:
        return rest, None
    file = Path(tables[0][0])
    if file.suffix != ".md" or not file.parent.is_dir():
        raise ConfigError(f"table={file}: expected the name of a .md file in a folder that exists.")
    return rest, file


def _report(cell: Composed) -> bool:
    """Prints every finding on the cell; returns whether one failed."""
    from morebench.conformance.cell import examine

    name = " + ".join(cell.choices[axis] for axis in AXES[:3])
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fits else _WIDTH)
    findings = list(examine(cell.config))
    console.print(_table(findings, name))
    counts = Counter(finding.verdict for finding in findings)
    ok, bad, left_out = (counts[verdict] for verdict in (Verdict.ok, Verdict.failed, Verdict.skipped))
    console.print(f"{name}: {ok} ok, {bad} failed, {left_out} skipped.")
    return bad > 0


def _table(findings: Iterable[Finding], name: str) -> Table:
    table = Table(title=name, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("topic", "what", "verdict", "found"):
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    before = ""
    for finding in findings:
        style = _STYLE[finding.verdict]
        table.add_row(
            "" if finding.topic == before else escape(finding.topic),
            escape(finding.what),
            f"[{style}]{finding.verdict.value}[/]",
            escape(finding.found),
        )
        before = finding.topic
    return table


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
