"""How `plan` prints what runs will cost."""

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import TextIO

from rich.console import Console
from rich.text import Text

from morebench.config.schema import Step
from morebench.matrix.cell import CHAIN
from morebench.matrix.estimate import Estimate, Estimator, estimates
from morebench.matrix.ledger import State
from morebench.matrix.plan import Plan
from morebench.show import STATE_STYLE, print_sources

_UNKNOWN = "--"
_HEADER = (
    f"{'cell and step':14} {'state':<11} {'FLOP':>8} {'GPUs':>5} {'hours':>8} {'GiB a rank':>10} {'disk':>8}"
)


def print_costs(plan: Plan, file: TextIO = sys.stdout) -> None:
    """A line for every run, the sums, what was assumed, and what the plan starts from."""
    estimator = Estimator()
    costs = estimates(plan, estimator)
    console = Console(file=file)
    # not a table of rich: a thousand cells have three thousand runs
    console.print(_runs(plan, costs), soft_wrap=True, highlight=False)
    for line in (*_sums(plan, costs), *_too_large(plan, costs)):
        console.print(Text(line), soft_wrap=True, highlight=False)
    if estimator.notes:
        console.print("Assumed:")
        for note in estimator.notes:
            console.print(Text(f"  {note}"), soft_wrap=True, highlight=False)
    print_sources(plan, file)


def _runs(plan: Plan, costs: Mapping[str, Estimate]) -> Text:
    text, printed = Text(_HEADER, style="bold"), set[str]()
    lines = Text()
    for cell, ids in zip(plan.cells, plan.ids, strict=True):
        lines.append(f"\n{cell.name}")
        for step in CHAIN:
            if step not in ids:
                continue
            run = plan.runs[ids[step]]
            lines.append(f"\n  {step.name:12} ")
            lines.append(f"{run.state.name:<11}", STATE_STYLE.get(run.state, ""))
            if run.run_id in printed:
                lines.append(" shared with a cell above")
            else:
                lines.append(f" {_numbers(costs[run.run_id])}")
            printed.add(run.run_id)
    lines.append("\n")
    return Text().append_text(text).append_text(lines)


def _numbers(cost: Estimate) -> str:
    memory = _UNKNOWN if cost.memory is None else f"{cost.memory / 2**30:,.1f}{'!' if cost.remedy else ''}"
    return (
        f"{_flops(cost.flops):>8} {cost.num_gpus:>5} {_hours(cost.seconds):>8} {memory:>10} "
        f"{_bytes(cost.peak):>8}"
    )


def _sums(plan: Plan, costs: Mapping[str, Estimate]) -> list[str]:
    lines = [
        *_sum(plan, costs, "To train", [step for step in CHAIN if step is not Step.evaluate]),
        *_sum(plan, costs, "To evaluate", [Step.evaluate]),
    ]
    one_by_one = sum(costs[run.run_id].seconds or 0 for run in plan.todo())
    if one_by_one:
        lines.append(
            f"One run after the other: {_hours(one_by_one)} h; all cells side by side: "
            f"{_hours(_longest_chain(plan, costs))} h."
        )
    kept = sum(costs[run.run_id].kept or 0 for run in plan.todo())
    more = max((_while_running(costs[run.run_id]) for run in plan.todo()), default=0)
    lines.append(
        f"Disk: {_bytes(kept)} when all is done, and up to {_bytes(more)} more for each run that is training."
    )
    return lines


def _sum(plan: Plan, costs: Mapping[str, Estimate], head: str, steps: Collection[Step]) -> Iterator[str]:
    """Of all runs of some steps; nothing where there are none."""
    number = sum(run.step in steps for run in plan.runs.values())
    if not number:
        return
    todo = [costs[run.run_id] for run in plan.todo() if run.step in steps]
    known = [cost for cost in todo if cost.flops is not None]
    line = f"{head}: {len(todo)} of {number} runs."
    if known:
        line += f" {_flops(sum(cost.flops or 0 for cost in known))}FLOP"
        hours = [cost.gpu_hours for cost in known if cost.gpu_hours is not None]
        line += f", {sum(hours):,.0f} GPU-hours{_price(plan, sum(hours))}." if hours else "."
    yield line
    if unknown := len(todo) - len(known):
        yield f"{unknown} of them cannot be priced{' yet' if Step.evaluate not in steps else ''}."


def _too_large(plan: Plan, costs: Mapping[str, Estimate]) -> list[str]:
    """A sentence for each kind of runs that would not fit."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in plan.todo():
        cost = costs[run.run_id]
        if cost.remedy:
            key = f"{run.step.name} with {run.cell.choices['llm']}", cost.remedy
            found.setdefault(key, []).append(cost.memory or 0)
    return [
        f"! {name} needs {max(needs) / 2**30:,.0f} GiB on a rank, {remedy}."
        for (name, remedy), needs in found.items()
    ]


def _price(plan: Plan, gpu_hours: float) -> str:
    rate = plan.cells[0].config.trainer.usd_per_gpu_hour
    return "" if rate is None else f", {rate * gpu_hours:,.0f} USD at {rate:g} a GPU-hour"


def _longest_chain(plan: Plan, costs: Mapping[str, Estimate]) -> float:
    """Seconds of the cell that takes longest from where it stands."""
    return max(
        sum(
            costs[run_id].seconds or 0 for run_id in ids.values() if plan.runs[run_id].state is not State.done
        )
        for ids in plan.ids
    )


def _while_running(cost: Estimate) -> float:
    return max(0.0, (cost.peak or 0) - (cost.kept or 0))


def _flops(count: float | None) -> str:
    if count is None:
        return _UNKNOWN
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= unit:
            return f"{count / unit:,.{2 if count < 100 * unit else 0}f} {name}"
    return f"{count / 1e9:.2f} G"


def _hours(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{seconds / 3600:,.{1 if seconds >= 360 else 3}f}"


def _bytes(count: float | None) -> str:
    if count is None:
        return _UNKNOWN
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.{1 if count < 100 * unit else 0}f} {name}"
    return f"{count / 1e3:,.0f} kB"
