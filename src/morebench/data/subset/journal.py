"""What was found about each candidate, so that a killed build does not look again."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from morebench.data.subset.drops import Drop
from morebench.data.subset.look import Looked


class Journal:
    """One line a candidate in rank order; from a line that was cut off on, all is forgotten."""

    def __init__(self, path: Path) -> None:
        self.known: list[Looked] = []
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                image, problem = json.loads(line)
                self.known.append(Looked(image, Drop[problem] if problem else None))
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                self.known.pop()
                break
            whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, looked: Sequence[Looked]) -> None:
        for one in looked:
            line = json.dumps([one.image, one.problem.name if one.problem else None])
            self._file.write(f"{line}\n".encode())
        self._file.flush()
