"""What the launcher shows while steps run: a live table on a terminal, otherwise plain lines."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from morebench.config.schema import Step
from morebench.errors import EXIT_DONE
from morebench.matrix import ledger
from morebench.matrix.plan import PlannedRun

_PLAIN_EVERY_S = 60.0
_TAIL_BYTES = 4096


@dataclass
class _Row:
    state: str = "waiting"
    begun: float | None = None
    seconds: float = 0.0
    detail: str = ""


class Display:
    def __init__(self, runs: list[PlannedRun]) -> None:
        self.runs = {run.run_id: run for run in runs}
        self.rows = {run.run_id: _Row() for run in runs}
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.last_plain = time.monotonic()

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.live:
            self.live.update(self._table(), refresh=True)
            self.live.stop()

    def started(self, run: PlannedRun) -> None:
        row = self.rows[run.run_id]
        row.state, row.begun = "running", time.monotonic()
        self._say(f"start  {run.run_id}")

    def note(self, run: PlannedRun, detail: str) -> None:
        row = self.rows[run.run_id]
        if row.detail != detail:
            row.detail = detail
            self._say(f"wait   {run.run_id}  {detail}")

    def ended(self, run: PlannedRun, code: int, message: str) -> None:
        row = self.rows[run.run_id]
        row.seconds = time.monotonic() - row.begun if row.begun else 0.0
        row.state = "done" if code == EXIT_DONE else f"exit {code}"
        row.detail = message.splitlines()[0] if message else ""
        finished = sum(other.state == "done" for other in self.rows.values())
        self._say(
            f"{row.state:6s} {run.run_id}  {row.seconds:.0f} s  {row.detail}  [{finished}/{len(self.rows)}]"
        )

    def refresh(self) -> None:
        for run_id, row in self.rows.items():
            if row.state == "running" and row.begun is not None:
                row.seconds = time.monotonic() - row.begun
                row.detail = progress_text(self.runs[run_id])
        if self.live:
            self.live.update(self._table(), refresh=True)
        elif time.monotonic() - self.last_plain >= _PLAIN_EVERY_S:
            self.last_plain = time.monotonic()
            for run_id, row in self.rows.items():
                if row.state == "running":
                    self._say(f"...    {run_id}  {row.seconds:.0f} s  {row.detail}")

    def _say(self, line: str) -> None:
        if not self.live:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        table.add_column("cell", overflow="fold")
        for title in ("step", "state", "time"):
            table.add_column(title, no_wrap=True)
        table.add_column()
        for run_id, row in self.rows.items():
            run = self.runs[run_id]
            shared = f" (+{len(run.shared_by) - 1})" if len(run.shared_by) > 1 else ""
            seconds = f"{row.seconds:.0f} s" if row.begun else ""
            table.add_row(run.cell.name + shared, run.step.name, row.state, seconds, row.detail)
        return table


def progress_text(run: PlannedRun) -> str:
    """`step 120/188, loss 1.92, 30k tokens/s, 12 s left`, from the files the step writes."""
    if run.step is Step.evaluate:
        return evaluate_text(run.folder)
    last = _last_line(run.folder / "metrics.jsonl")
    if last is None:
        return "preparing"
    total = json.loads((run.folder / "manifest.json").read_text()).get("num_steps", 0)
    left = max(0, total - last["step"] - 1) * last["step_s"]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
    mfu = f"MFU {last['mfu']:.1%}, " if last.get("mfu") is not None else ""
    return (
        f"step {last['step'] + 1}/{total}, loss {loss}, "
        f"{last['tokens_per_s'] / 1000:.1f}k tokens/s, {mfu}{left:.0f} s left"
    )


def evaluate_text(folder: Path) -> str:
    """`1,234/62,000 answers: gqa 400/12578, pope.blind 834/9000`; tasks that are neither new nor done."""
    files = sorted((folder / "predictions").glob("*.jsonl"))
    answers = {path.name: path.read_bytes().count(b"\n") for path in files}
    wanted = (ledger.read_json(folder / "manifest.json") or {}).get("questions") if answers else None
    if not wanted:
        return "preparing"
    counts = {name: (answers.get(name, 0), wanted[name]) for name in wanted}
    begun = [
        f"{name.removesuffix('.jsonl')} {found}/{number}"
        for name, (found, number) in counts.items()
        if 0 < found < number
    ]
    total = f"{sum(found for found, _ in counts.values()):,}/{sum(wanted.values()):,} answers"
    return f"{total}: {', '.join(begun)}" if begun else total


def _last_line(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last newline may be half-written
        if line.startswith(b"{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None
