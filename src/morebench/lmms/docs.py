"""A task's items in the shape of a data set of lmms-eval, and the scores of its answers."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from morebench import entry
from morebench.config.compose import compose_config
from morebench.config.overrides import check
from morebench.config.schema import Config, Profile
from morebench.errors import ConfigError, MorebenchError
from morebench.evaluation.items import Item, OpenTask
from morebench.evaluation.records import open_task
from morebench.evaluation.scoring import score_items

_KEYS = ("suite", "of_suite", "profile")


@contextmanager
def told() -> Iterator[None]:
    """lmms-eval prints a traceback of what it catches and exits with 0: leave before it does."""
    try:
        yield
    except MorebenchError as error:
        entry.fail(error)


class Doc(dict[str, Any]):
    """A record, the item it is of, and the item's position among those of the task."""

    def __init__(self, item: Item, at: int) -> None:
        super().__init__(item.record)
        self.item, self.at = item, at


class Docs:
    """As much of a `datasets.Dataset` as lmms-eval uses. Images are left to the items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    @property
    def features(self) -> Mapping[str, Any]:
        return self[0]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Doc]:
        return (Doc(item, at) for at, item in enumerate(self._items))

    def __getitem__(self, at: int) -> Doc:
        return Doc(self._items[at], at)


def task_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """Ours, of a task's YAML file. Raises ConfigError."""
    if missing := [key for key in _KEYS if key not in config]:
        raise ConfigError(f"task {config.get('task')}: its YAML file has no {', '.join(missing)}.")
    return {key: str(config[key]) for key in _KEYS}


def open_suite_task(suite: str, name: str, profile: str) -> OpenTask:
    """Task `name` of a suite, from where the evaluate step has it. Raises ConfigError and DataError."""
    if profile not in Profile.__members__:
        raise ConfigError(f"profile must be one of {', '.join(Profile.__members__)}, found {profile!r}.")
    check([f"suite={suite}"], multirun=False)
    config = _suite(suite)
    if name not in config.suite.tasks:
        raise ConfigError(f"suite {suite} has no task {name}. There are: {', '.join(config.suite.tasks)}.")
    return open_task(name, config.suite.tasks[name], config.paths, Profile[profile])


@functools.lru_cache
def _suite(name: str) -> Config:
    return compose_config([f"suite={name}"]).config


class Metrics:
    """All metrics of a task from the answers to some of its items: what the evaluate step would write."""

    def __init__(self, task: OpenTask, profile: Profile) -> None:
        self._task, self._profile = task, profile
        self._last: tuple[list[tuple[int, str]], dict[str, float]] = ([], {})
        # All that right answers give; nothing in them is left to a judge.
        self.names = list(self.of([(at, _right(task, at)) for at in range(len(task.items))]))

    def of(self, answers: Sequence[tuple[int, str]]) -> dict[str, float]:
        """`answers`: (position in the task's items, text), in any order. lmms-eval asks once per metric."""
        ordered = sorted(answers)
        if self._last[0] != ordered:
            records = [(text, self._task.items[at].record) for at, text in ordered]
            scored = score_items(self._task.benchmark, records, self._profile)
            self._last = ordered, self._task.benchmark.aggregate(scored, self._profile)
        return self._last[1]


def _right(task: OpenTask, at: int) -> str:
    target = task.benchmark.target(task.items[at].record)
    return target if isinstance(target, str) else target[0]
