"""How the commands print a plan and its outcomes."""

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from morebench.data.checked import DataState, Status
from morebench.errors import EXIT_DONE
from morebench.matrix import ledger
from morebench.matrix.cell import CHAIN
from morebench.matrix.launch import Outcome
from morebench.matrix.ledger import State
from morebench.matrix.plan import Plan

STATE_STYLE = {State.done: "green", State.running: "cyan", State.failed: "red", State.interrupted: "yellow"}


def print_plan(plan: Plan, file: TextIO = sys.stdout) -> None:
    """One row a cell, one column a step, then what will run and what is shared."""
    console = Console(file=file)
    table = Table(box=None, header_style="bold")
    table.add_column("cell", overflow="fold")
    for step in CHAIN:
        table.add_column(step.name, min_width=8)
    for cell, ids in zip(plan.cells, plan.ids, strict=True):
        row = []
        for step in CHAIN:
            if step not in ids:
                row.append("")
                continue
            run = plan.runs[ids[step]]
            shared = f" (shared by {len(run.shared_by)})" if len(run.shared_by) > 1 else ""
            style = STATE_STYLE.get(run.state, "default")
            row.append(f"[{style}]{run.state.name}[/]{shared}")
        table.add_row(cell.name, *row)
    console.print(table)
    print_sources(plan, file)


def print_sources(plan: Plan, file: TextIO = sys.stdout) -> None:
    """How much is done, and what the plan starts from."""
    console = Console(file=file)
    for parent in {cell.parent.run_id: cell.parent for cell in plan.cells if cell.parent}.values():
        text = f"Starts from {parent.folder}, with the LLM and vision weights that this run was made with:"
        console.print(escape(text), highlight=False, soft_wrap=True)
        for part, weights in (("llm", parent.config.llm.weights), ("vision", parent.config.vision.weights)):
            place = weights.folder or weights.hub_id or "built here"
            console.print(escape(f"  {part}: {place}"), highlight=False, soft_wrap=True)
    done = len(plan.runs) - len(plan.todo())
    console.print(f"{len(plan.cells)} cells, {len(plan.runs)} runs: {done} done, {len(plan.todo())} to do.")
    console.print(_data_table(plan.data))
    for sentence in plan.unusable_data:
        console.print(f"[red]Cannot be trained on:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    if plan.missing_sources:
        console.print("Not on this machine, so that run ids are provisional:")
        for sentence in plan.missing_sources:
            console.print(f"  {escape(sentence)}", highlight=False, soft_wrap=True)


def _data_table(states: Sequence[DataState]) -> Table:
    """One row for every manifest of training data that the plan rests on."""
    table = Table(box=None, header_style="bold")
    table.add_column("training data", overflow="fold")
    for column in ("samples", "quarantined", "images", "checked", "content"):
        table.add_column(column, justify="left" if column == "content" else "right", no_wrap=True)
    for state in states:
        manifest = state.manifest
        if manifest is None or state.status is not Status.checked:
            table.add_row(escape(state.data.label), "", "", "", f"[yellow]{state.status.value}[/]")
            continue
        share = f" ({manifest.quarantined_share:.3%})" if manifest.num_quarantined else ""
        table.add_row(
            escape(state.data.label),
            f"{manifest.num_samples:,}",
            f"{manifest.num_quarantined:,}{share}",
            f"{manifest.num_images:,}",
            manifest.checked[:10],
            manifest.content_hash[:12],
        )
    return table


def print_failures(plan: Plan, file: TextIO = sys.stdout) -> None:
    console = Console(file=file)
    for run in plan.runs.values():
        if run.state in (State.failed, State.interrupted):
            reason = ledger.last_message(run.folder) or "killed; the next start continues"
            console.print(f"{run.run_id}: {escape(reason)}", highlight=False, soft_wrap=True)


def print_outcomes(plan: Plan, outcomes: Sequence[Outcome], file: TextIO = sys.stdout) -> None:
    console = Console(file=file)
    failed = [outcome for outcome in outcomes if outcome.exit_code != EXIT_DONE]
    for outcome in failed:
        console.print(
            f"[red]exit {outcome.exit_code}[/] {outcome.run.run_id}: {escape(outcome.message)}",
            highlight=False,
            soft_wrap=True,
        )
    done = sum(ledger.is_done(run.folder) for run in plan.runs.values())
    console.print(f"{done} of {len(plan.runs)} runs done." + (f" {len(failed)} failed." if failed else ""))
