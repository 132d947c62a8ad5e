"""predictions/<task>.jsonl: appended batch by batch, so that a killed evaluation continues where it was."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from morebench.training.files import disk_full_named, write_atomically


class PredictionsFile:
    """Holds the lines of an earlier start by item index; a line that a kill cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(exist_ok=True)
        for line in self._path.read_text().splitlines() if self._path.is_file() else []:
            try:
                found = json.loads(line)
            except ValueError:
                break
            self.lines[found["index"]] = found
        write_lines(self._path, self.lines.values())
        self._file = self._path.open("a")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        lines = list(lines)
        with disk_full_named(self._path):
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.lines |= {line["index"]: line for line in lines}


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """All or nothing."""
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
