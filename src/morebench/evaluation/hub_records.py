"""Records of a hub data set, with images in its rows or in those of another config."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from morebench.config.schema import Paths, TaskData
from morebench.data.findings import Kind, SampleError, printable
from morebench.data.once import alone
from morebench.errors import DataError, join_problems
from morebench.evaluation.hub import absence, find_place
from morebench.evaluation.image_store import ImageStore, Index, load_image_of
from morebench.evaluation.items import StoredImage, TaskSource, Wanted
from morebench.evaluation.rows import Rows, StoredBytes
from morebench.evaluation.tasks.benchmark import Record
from morebench.progress import Progress

_ID, _IMAGE = "id", "image"  # columns of an image config


class HubRecords:
    def __init__(self, name: str, data: TaskData, paths: Paths) -> None:
        place = find_place(data, paths)
        if place is None:
            raise DataError(f"{name}: {absence(data, paths)}")
        self._task, self._data = name, data
        self._rows = Rows(place.folder, place.rows)
        self._image_rows = Rows(place.folder, place.images) if data.image_config else self._rows
        if empty := [rows.where for rows in (self._rows, self._image_rows) if rows.num_rows == 0]:
            raise DataError(
                join_problems(f"{where}: the split has no rows." for where in dict.fromkeys(empty))
            )
        self._at, self._cache = place, Path(paths.cache)
        self._store = ImageStore(self._cache / "benchmark_images")
        self.place = self._rows.where
        self._records: Sequence[Record] = []

    @cached_property
    def fact(self) -> TaskSource:
        at, content_hash = self._at, self._at.content_hash(self._cache)
        return TaskSource(at.origin.value, str(at.folder), at.hub_id, at.commit, content_hash)

    def where(self, row: int) -> str:
        return f"{self._rows.where}: row {row}"

    def records(self, fields: Sequence[str]) -> Sequence[Record]:
        key = self._data.image_field
        problems = _lacking(self._rows, [*fields, *([key] if key else [])])
        if key:
            problems += _lacking(self._image_rows, [_ID, _IMAGE])
        if problems:
            raise DataError(join_problems(problems))
        self._records = self._rows.records()
        return self._records

    def images(self, wanted: Sequence[Wanted]) -> list[StoredImage]:
        """Those that are not in the store yet are copied there: a row group cannot be read at random."""
        is_joined = self._data.image_field is not None
        at = self._joined(wanted) if is_joined else [(one.row, one.place) for one in wanted]
        if not is_joined:
            self._check(wanted)
        keys = self._keys(dict.fromkeys(at))
        return [self._stored(one, keys[place][row]) for one, (row, place) in zip(wanted, at, strict=True)]

    def _stored(self, wanted: Wanted, key: str) -> StoredImage:
        name = f"row {wanted.row}, {wanted.place}"
        if self._data.image_field:
            name += f" {self._records[wanted.row][self._data.image_field]}"
        where = f"{self._task}: {name} (id {wanted.id})"
        return StoredImage(key, name, partial(load_image_of, self._store.path(key), key, where))

    def _check(self, wanted: Sequence[Wanted]) -> None:
        """Whether the rows have these images."""
        columns = dict.fromkeys(one.column for one in wanted)
        if lacking := [column for column in columns if column not in self._rows.image_columns]:
            raise DataError(
                f"{self._rows.where}: expected the image column {', '.join(lacking)}, with `bytes` and "
                f"`path` as on the hub; found {self._rows.told_columns()}."
            )
        problems = []
        for one in wanted:
            cell = self._records[one.row][one.column]
            if one.number is None:
                is_there = cell is not None and (not isinstance(cell, list) or cell == [f"{one.place}[0]"])
            else:
                is_there = isinstance(cell, list) and one.number < len(cell) and cell[one.number] is not None
            if not is_there:
                found = f"a list of {len(cell)}" if isinstance(cell, list) else "null"
                problems.append(
                    f"{self.where(one.row)} (id {one.id}): {one.place} is asked about, but is {found}"
                )
        if problems:
            raise DataError(join_problems(problems))

    def _joined(self, wanted: Sequence[Wanted]) -> list[tuple[int, str]]:
        """Where in the image config the image of each row is."""
        images = self._image_rows.records()
        names = [self._records[one.row][str(self._data.image_field)] for one in wanted]
        needed, rows = Counter(names), {record[_ID]: number for number, record in enumerate(images)}
        place = self._image_rows.where
        problems = [
            f"{place}: {_ID} {name!r} occurs {count} times"
            for name, count in Counter(record[_ID] for record in images).items()
            if count > 1
        ]
        problems += [
            f"{place}: there is no image with {_ID} {name!r}, which {count} records ask about"
            for name, count in needed.items()
            if name not in rows
        ]
        problems += [
            f"{place}: the image with {_ID} {record[_ID]!r} is null"
            for record in images
            if record[_ID] in needed and record[_IMAGE] is None
        ]
        if problems:
            raise DataError(join_problems(problems))
        return [(rows[name], _IMAGE) for name in names]

    def _keys(self, wanted: Mapping[tuple[int, str], None]) -> Index:
        """Of every wanted image; reads those of which the key is not known, in one process at a time."""
        content = self.fact.content_hash
        index = self._store.index(content)
        if not _unknown(index, wanted):
            return index
        with alone(self._store.index_file(content)):
            index = self._store.index(content)
            problems = []
            try:
                for problem in self._read(_unknown(index, wanted), index):
                    problems.append(problem)
            finally:
                self._store.remember(content, index)
        if problems:
            raise DataError(join_problems(problems))
        return index

    def _read(self, unknown: Mapping[str, set[int]], index: Index) -> Iterator[str]:
        """Fills `index`; yields what is wrong."""
        with Progress(f"{self._task}: images", sum(map(len, unknown.values()))) as progress:
            for number, (row, place, image) in enumerate(self._image_rows.images(unknown), start=1):
                try:
                    index.setdefault(place, {})[row] = self._store.add(_content(image))
                except SampleError as error:
                    yield f"{self._task}: {self._image_rows.where}: row {row}, {place}: {error}"
                progress.update(number)


def _lacking(rows: Rows, fields: Sequence[str]) -> list[str]:
    lacking = [field for field in dict.fromkeys(fields) if field not in rows.columns]
    if not lacking:
        return []
    return [f"{rows.where}: no column {', '.join(lacking)}; found {rows.told_columns()}."]


def _unknown(index: Index, wanted: Iterable[tuple[int, str]]) -> dict[str, set[int]]:
    unknown: dict[str, set[int]] = defaultdict(set)
    for row, place in wanted:
        if row not in index.get(place, {}):
            unknown[place].add(row)
    return unknown


def _content(image: StoredBytes) -> bytes:
    if image.content is None:
        found = (
            "neither bytes nor a path" if image.path is None else f"only the path {printable(image.path)!r}"
        )
        raise SampleError(
            Kind.missing, f"expected the bytes of an image, found {found}, which is not followed."
        )
    return image.content
