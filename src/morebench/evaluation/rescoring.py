"""Whether predictions that are there answer what the suite asks now. No torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from morebench.config.schema import Config
from morebench.errors import DataError, join_problems
from morebench.evaluation.predictions import Line, read_predictions
from morebench.evaluation.sheets import Sheet


def usable_predictions(
    config: Config, sheets: Sequence[Sheet], made: Config, folder: Path
) -> list[list[Line]]:
    """Lines of every sheet in record order, from the evaluate run in `folder`, whose config is `made`.

    Raises one DataError for everything that would have to be generated again.
    """
    lines: list[list[Line]] = []
    problems = list(_changed_recipe(config, made))
    for sheet in sheets:
        found = {line["index"]: line for line in read_predictions(folder / "predictions" / sheet.file)}
        problems += _problems(sheet, found, config, made)
        lines.append([found[item.index] for item in sheet.task.items if item.index in found])
    if problems:
        raise DataError(
            f"The predictions of {folder.name} cannot be scored as asked, without rescore=true this is "
            f"generated again:\n{join_problems(problems)}"
        )
    return lines


def _changed_recipe(config: Config, made: Config) -> Iterator[str]:
    """Beside prompts and lengths, which are compared one by one."""
    for key in ("precision", "image_aspect_ratio"):
        now, then = (getattr(one.stage.evaluate, key).name for one in (config, made))
        if now != then:
            yield f"everything: generated with stage.evaluate.{key}={then}, asked for is {now}."


def _problems(sheet: Sheet, found: dict[int, Line], config: Config, made: Config) -> Iterator[str]:
    task, num_items = sheet.task, len(sheet.task.items)
    if not found:
        yield f"{sheet.label}: has no predictions."
        return
    then = made.suite.tasks.get(task.name)
    length = then and then.max_new_tokens[made.stage.evaluate.profile.name]
    if length != task.max_new_tokens:
        yield f"{sheet.label}: generated with max_new_tokens={length}, asked for is {task.max_new_tokens}."
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for at, item in enumerate(task.items):
        if reason := _stale(sheet, at, found.get(item.index)):
            reasons[reason] += 1
            first.setdefault(reason, item.id)
    profiles = [one.stage.evaluate.profile.name for one in (made, config)]
    hint = f" (profile {profiles[0]} then, {profiles[1]} now)" if profiles[0] != profiles[1] else ""
    for reason, count in reasons.items():
        yield f"{sheet.label}: {count:,} of {num_items:,} items {reason}{hint}, first {first[reason]}."


def _stale(sheet: Sheet, at: int, line: Line | None) -> str | None:
    item = sheet.task.items[at]
    if line is None:
        return "have no prediction"
    if line["id"] != item.id or line["question"] != item.question.text:
        return "were asked another question"
    if line.get("images_sha256") != sheet.images_sha256(at):
        return "were asked about another image"
    return None
