"""predictions/<task>.jsonl: appended chunk by chunk, so that a killed evaluation continues where it was."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morebench.training.files import disk_full_named, write_atomically

Line = dict[str, Any]


class PredictionsFile:
    """Holds the lines of an earlier start by item index.

    Dropped are a line that a kill cut short, and lines that answer something else than the item asks now.
    `asked`: of every item by its index, the fields that say so (hashes of its prompt and images).
    """

    def __init__(self, path: Path, asked: Mapping[int, Mapping[str, str]]) -> None:
        self._path = path
        self._asked = asked
        self._is_clean = False
        self.lines = {
            line["index"]: line
            for line in read_predictions(path)
            if line["index"] in asked and asked[line["index"]].items() <= line.items()
        }

    @property
    def num_missing(self) -> int:
        return len(self._asked) - len(self.lines)

    def append(self, lines: Iterable[Line]) -> None:
        """One write, on the disk when this returns."""
        self._clean()
        lines = list(lines)
        with (
            disk_full_named(self._path, kept="What was answered so far is kept"),
            self._path.open("a") as file,
        ):
            file.write(_text(lines))
            file.flush()
            os.fsync(file.fileno())
        self.lines |= {line["index"]: line for line in lines}

    def finish(self) -> list[Line]:
        """The lines in record order, as the file has them from now on."""
        ordered = [self.lines[index] for index in sorted(self._asked)]
        write_lines(self._path, ordered)
        return ordered

    def _clean(self) -> None:
        """What was dropped must not stand before what is appended; nothing is written before that."""
        if not self._is_clean:
            self._path.parent.mkdir(exist_ok=True)
            write_lines(self._path, self.lines.values())
            self._is_clean = True


def read_predictions(path: Path) -> list[Line]:
    """Up to a line that a kill cut short, or that is no prediction; none where there is no file."""
    lines: list[Line] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "index" not in line:
            break
        lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """All or nothing."""
    write_atomically(path, _text(lines))


def _text(lines: Iterable[Mapping[str, Any]] | Sequence[Line]) -> str:
    # ASCII only: a kill cannot cut a character in two, and no character in an answer ends a line.
    return "".join(json.dumps(line) + "\n" for line in lines)
