"""One evaluate run in the terminal: its columns, and the answers that a score says nothing about."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from morebench.config import compose
from morebench.config.schema import Config
from morebench.evaluation.anomalies import KINDS
from morebench.evaluation.tasks.benchmark import IMAGE_TOKEN
from morebench.reporting.results import read_json
from morebench.reporting.tables import MISSING

_EXAMPLES = 2  # of each kind that are printed; results.json has more

Results = Mapping[str, Any]


def print_scores(folder: Path, console: Console) -> None:
    """Readable at 80 columns. Raises RunError if the run's files are not those of a finished one."""
    results = read_json(folder / "results.json")
    config = compose.load_config(folder / "config.yaml")
    _print(console, Text(f"\n{folder.name}", style="bold"))
    console.print(_scores(config, results))
    for sentence in _warnings(results):
        console.print(Text(f"warning: {sentence}", style="yellow"), highlight=False)
    found = {
        task: result["anomalies"] for task, result in results["tasks"].items() if result.get("anomalies")
    }
    if not found:
        return
    _print(console, Text("\nAnswers to look at", style="bold"))
    console.print(_counts(results, found))
    for line in _examples(found):
        console.print(line, no_wrap=True, overflow="ellipsis", highlight=False)
    _print(console, Text(f"More examples: {folder / 'results.json'}", style="dim"))


def _scores(config: Config, results: Results) -> Table:
    """One row a column. Under a control: its own number, and how much of the score needs the image."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(config.suite.label, no_wrap=True)
    controls = results.get("controls", {})
    for header in ("score", *(part for name in controls for part in (name, f"over {name}")), "asked"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("profile", no_wrap=True)
    for column in config.suite.columns:
        of = {None: results["tasks"], **controls}
        values = {
            name: column.factor * tasks[column.task]["metrics"][column.metric]
            for name, tasks in of.items()
            if column.metric in tasks.get(column.task, {}).get("metrics", {})
        }
        cells = [_number(values.get(None), column.digits)]
        for name in controls:
            value, own = values.get(name), values.get(None)
            difference = None if value is None or own is None else own - value
            cells += [_number(value, column.digits), _number(difference, column.digits, sign="+")]
        n = results["tasks"].get(column.task, {}).get("n")
        table.add_row(column.label, *cells, MISSING if n is None else f"{n:,}", results["profile"])
    return table


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return MISSING if value is None else f"{value:{sign}.{digits}f}"


def _warnings(results: Results) -> Iterator[str]:
    for task, result in results["tasks"].items():
        yield from (f"{task}: {sentence}" for sentence in result.get("warnings", ()))
    flips = results.get("flips")
    if flips and flips["flips"]:
        yield (
            f"{flips['flips']} of {flips['n']} answers that were generated once more alone came out "
            "otherwise: bf16 rounds differently in another batch."
        )


def _counts(results: Results, found: Mapping[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("items", justify="right")
    table.add_column("of", justify="right")
    for task, own in found.items():
        for kind, anomaly in own.items():
            table.add_row(task, kind, f"{anomaly['n']:,}", f"{results['tasks'][task]['n']:,}")
    return table


def _examples(found: Mapping[str, Any]) -> Iterator[Text]:
    for kind, meaning in KINDS.items():
        own = {task: anomalies[kind] for task, anomalies in found.items() if kind in anomalies}
        if own:
            yield Text(f"{kind}: {meaning}")
        for task, anomaly in own.items():
            for example in anomaly["examples"][:_EXAMPLES]:
                answer = f"{example['prediction']!r}, expected {example['target']!r}"
                question = " ".join(example["question"].replace(IMAGE_TOKEN, "").split())
                yield Text(f"  {task} {example['id']}: {answer}; {question}", style="dim")


def _print(console: Console, text: Text) -> None:
    console.print(text, highlight=False, soft_wrap=True)
