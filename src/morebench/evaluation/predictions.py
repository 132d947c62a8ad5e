"""predictions/<task>.jsonl: appended batch by batch, so that a killed evaluation continues where it was."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from morebench.training.files import disk_full_named, write_atomically


class PredictionsFile:
    """Holds the lines of an earlier start by item index.

    Dropped are a line that a kill cut short, and lines whose prompt is no longer the item's: `prompts` is the
    prompt's hash by index.
    """

    def __init__(self, path: Path, prompts: Mapping[int, str]) -> None:
        self._path = path
        self._prompts = prompts
        self.lines: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(exist_ok=True)
        for line in self._path.read_bytes().splitlines() if self._path.is_file() else []:
            try:
                found = json.loads(line)
            except ValueError:
                break
            if self._prompts.get(found["index"]) == found.get("prompt_sha256", ""):
                self.lines[found["index"]] = found
        write_lines(self._path, self.lines.values())
        self._file = self._path.open("a")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def finish(self) -> list[dict[str, Any]]:
        """The lines in record order, as the file has them from now on."""
        ordered = [self.lines[index] for index in sorted(self._prompts)]
        write_lines(self._path, ordered)
        return ordered

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        lines = list(lines)
        with disk_full_named(self._path):
            self._file.write(_text(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.lines |= {line["index"]: line for line in lines}


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """All or nothing."""
    write_atomically(path, _text(lines))


def _text(lines: Iterable[Mapping[str, Any]]) -> str:
    # ASCII only: a kill cannot cut a character in two, and no character in an answer ends a line.
    return "".join(json.dumps(line) + "\n" for line in lines)
