"""`python -m morebench.evaluate outputs=PATH task=NAME`: published outputs, scored here and compared."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from morebench.config.compose import compose_config
from morebench.config.overrides import check
from morebench.config.schema import Config
from morebench.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from morebench.evaluation.records import open_task
from morebench.evaluation.replay import Replayed, replay_outputs

_SHOWN = 5  # items printed of each kind


def show_replay(outputs: Path, task: str, overrides: Sequence[str]) -> int:
    """Prints the comparison; an exit code. Raises ConfigError, and DataError for outputs of other records."""
    check(overrides, multirun=False)
    config = compose_config(overrides).config
    if task not in config.suite.tasks:
        raise ConfigError(
            f"task={task}: suite {config.suite.label!r} has {', '.join(config.suite.tasks)}. "
            "Another suite: suite=NAME."
        )
    profile = config.stage.evaluate.profile
    opened = open_task(task, config.suite.tasks[task], config.paths, profile)
    found = replay_outputs(outputs, opened, profile)
    print(f"{task}, profile {profile.name}: {found.num_items} outputs, one for every item.")
    _print_items(found)
    Console().print(_metrics_table(found, task, config))
    print("Same." if found.is_same else "NOT the same.")
    return EXIT_DONE if found.is_same else EXIT_FAILED


def _print_items(found: Replayed) -> None:
    if found.num_scores:
        compared = found.num_scores - found.num_guesses
        print(f"{compared} published scores of items compared, {len(found.differences)} differ from ours.")
    else:
        print("No item has a published score: only the metrics can be compared.")
    for line in found.differences[:_SHOWN]:
        print(f"  {line}")
    if found.num_guesses:
        print(
            f"{found.num_guesses} unreadable answers were guessed at random there: taken over as they fell."
        )
    if found.other_prompts:
        print(
            f"{len(found.other_prompts)} items were asked in other words there (another profile?): "
            f"{', '.join(found.other_prompts[:_SHOWN])}"
        )
    if found.unknown_metrics:
        print(f"Published, but none of ours: {', '.join(found.unknown_metrics)}")
    print(f"Metrics: {found.metrics_file or 'no results file lies beside the outputs'}")


def _metrics_table(found: Replayed, task: str, config: Config) -> Table:
    """What was published, and the suite's columns."""
    columns = {column.metric for column in config.suite.columns if column.task == task}
    table = Table(box=None, header_style="bold")
    for name, justify in (("metric", "left"), ("there", "right"), ("here", "right"), ("", "left")):
        table.add_column(name, justify="left" if justify == "left" else "right")
    for metric in found.metrics:
        if metric.published is not None or metric.name in columns:
            there = "--" if metric.published is None else f"{metric.published:.6f}"
            table.add_row(metric.name, there, f"{metric.ours:.6f}", "differs" if metric.differs else "")
    return table
