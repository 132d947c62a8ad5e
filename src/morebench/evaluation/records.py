"""Records of a task, read and checked before any model is loaded. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from morebench.config.compose import build
from morebench.config.schema import Paths, Profile, Task, TaskData
from morebench.errors import DataError, join_problems
from morebench.evaluation.hub import find_place
from morebench.evaluation.hub_records import HubRecords
from morebench.evaluation.items import Item, OpenTask, StoredImage, TaskSource, Wanted
from morebench.evaluation.json_records import JsonRecords, json_hash
from morebench.evaluation.tasks.benchmark import Benchmark, Question, Record


class Source(Protocol):
    """Every method raises one DataError for all that is wrong."""

    place: str

    @property
    def fact(self) -> TaskSource: ...

    def where(self, row: int) -> str: ...

    def records(self, fields: Sequence[str]) -> Sequence[Record]:
        """All have `fields`; in place of an image stands its name, or null."""

    def images(self, wanted: Sequence[Wanted]) -> list[StoredImage]: ...


def open_task(name: str, task: Task, paths: Paths, profile: Profile) -> OpenTask:
    """Raises one DataError for all records that lack a field, an answer or an image.

    Every image's header is looked at the first time; its pixels when the question is answered.
    """
    benchmark: Benchmark = build(task.code)
    data = task.data
    source: Source = JsonRecords(name, data, paths) if data.records else HubRecords(name, data, paths)
    records = [_mended(record, benchmark) for record in source.records(benchmark.fields)]
    ids, problems = _ids(source, records, benchmark)
    questions: list[Question] = []
    for row, record in enumerate(records):
        try:
            questions.append(_question(record, benchmark, profile))
        except DataError as error:
            problems.append(f"{source.where(row)}: {error}")
    if problems:
        raise DataError(join_problems(problems))
    if data.num_rows not in (None, len(records)):
        raise DataError(f"{source.place}: {len(records)} records, expected the published {data.num_rows}.")
    wanted = [
        Wanted(row, place, ids[row]) for row, question in enumerate(questions) for place in question.images
    ]
    images = iter(source.images(wanted))
    items = [
        Item(row, ids[row], records[row], question, tuple(next(images) for _ in question.images))
        for row, question in enumerate(questions)
    ]
    return OpenTask(name, benchmark, items, task.max_new_tokens[profile.name], source.fact)


def task_hash(data: TaskData, paths: Paths) -> str | None:
    """sha256 over what holds the records and their images; None while it is not on this machine."""
    if data.records:
        return json_hash(data, paths)
    place = find_place(data, paths)
    return None if place is None else place.content_hash(Path(paths.cache))


def _mended(record: Record, benchmark: Benchmark) -> Record:
    nulls = {field: text for field, text in benchmark.instead_of_null if record.get(field, "") is None}
    return {**record, **nulls} if nulls else record


def _ids(source: Source, records: Sequence[Record], benchmark: Benchmark) -> tuple[list[str], list[str]]:
    """What people call the records, and what is wrong with that."""
    field = benchmark.unique
    if field is None:
        return [str(r.get("id", r.get("question_id", row))) for row, r in enumerate(records)], []
    found = [record[field] for record in records]
    problems = [
        f"{source.where(row)}: {field} must be text or a whole number, found {value!r}"
        for row, value in enumerate(found)
        if isinstance(value, bool) or not isinstance(value, str | int)
    ]
    kinds = {type(value).__name__ for value in found}
    if not problems and len(kinds) > 1:
        problems = [f"{source.place}: {field} is a number in some records and text in others"]
    first: dict[str, int] = {}
    for row, value in enumerate(map(str, found)):
        if (before := first.setdefault(value, row)) != row:
            problems.append(f"{source.where(row)}: {field} {value!r} occurs before, at number {before}")
    return list(map(str, found)), problems


def _question(record: Record, benchmark: Benchmark, profile: Profile) -> Question:
    if nulls := [field for field in benchmark.fields if record[field] is None]:
        # a wrong type, too, is found below; but str() of a null would go through
        raise DataError(
            f"a field is not of the type that {type(benchmark).__name__} needs: {', '.join(nulls)} is null"
        )
    try:
        question = benchmark.question(record, profile)
        benchmark.target(record)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise DataError(
            f"a field is not of the type that {type(benchmark).__name__} needs: {error!r}"
        ) from error
    return question
