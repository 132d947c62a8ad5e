"""Replays files of measured cases (`{"cases", "aggregate"}`) through our scorers, item by item.

Everything in a file that one of our values answers to is compared; what is left over is named.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench.errors import DataError, MorebenchError
from morebench.evaluation.golden_values import KINDS, Case, Values

TOLERANCE = 1e-9

_NO_RESULTS = frozenset({"id", "benchmark", "record", "prediction", "note", "provenance"})


@dataclass(frozen=True)
class Replay:
    """`differences`: a line per value that came out otherwise. `not_compared`: keys we have no value for."""

    name: str
    num_compared: int
    differences: tuple[str, ...]
    not_compared: tuple[str, ...]


class _Comparison:
    def __init__(self) -> None:
        self.num_compared = 0
        self.differences: list[str] = []
        self.not_compared: dict[str, None] = {}

    def values(
        self, where: str, expected: Mapping[str, Any], found: Mapping[str, Any], key: str = ""
    ) -> None:
        """`key`: where in the file the two mappings stand."""
        for name, value in expected.items():
            path = f"{key}.{name}" if key else name
            if not key and name in _NO_RESULTS:
                continue
            if name not in found:
                # A value that says nothing is nothing to compare.
                if value is not None or key:
                    self.not_compared[path] = None
            elif isinstance(value, Mapping) and isinstance(found[name], Mapping):
                self.values(where, value, found[name], path)
            else:
                self._same(f"{where}{path}", value, found[name])

    def _same(self, where: str, expected: Any, found: Any) -> None:
        self.num_compared += 1
        if not _equal(expected, found):
            self.differences.append(f"{where}: expected {expected!r}, found {found!r}")


def replay(path: Path) -> Replay:
    """Raises DataError if the file is not one of golden cases of a benchmark we score."""
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, but: {error}") from error
    values = KINDS[_kind(path, golden)]
    comparison = _Comparison()
    try:
        cases = [_named(case, number) for number, case in enumerate(golden.get("cases", []))]
        found = values(golden)
        for case, ours in zip(cases, found.cases, strict=True):
            comparison.values(f"{case['id']} ", case, ours)
        for name, value in golden.items():
            if name in found.whole:
                comparison.values("", {name: value}, found.whole)
            elif name not in ("cases", "benchmark", "provenance", "profiles"):
                comparison.not_compared[name] = None
    except MorebenchError as error:
        raise DataError(f"{path}: a case can't be scored: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}: its cases are not of the form that a {path.stem} file has: {error!r}"
        ) from error
    if not comparison.num_compared:
        raise DataError(f"{path}: holds nothing to compare.")
    return Replay(
        path.stem, comparison.num_compared, tuple(comparison.differences), tuple(comparison.not_compared)
    )


def _kind(path: Path, golden: Any) -> str:
    """What the file's `benchmark` says, else its name (`gqa.json`, `gqa-large.json`)."""
    stated = golden.get("benchmark") if isinstance(golden, dict) else None
    name = str(stated or path.stem).lower()
    fits = [kind for kind in KINDS if re.match(rf"{kind}($|[-_.])", name)]
    if not isinstance(golden, dict) or not fits or not {"cases", "table"} & golden.keys():
        raise DataError(
            f"{path}: expected an object with `cases`, and as its `benchmark` or file name one of "
            f"{', '.join(sorted(KINDS))}; found {name!r}"
            + (f" with {', '.join(golden)}." if isinstance(golden, dict) and golden else ".")
        )
    return max(fits, key=len)


def _named(case: Case, number: int) -> Case:
    return {"id": f"case {number}", **case}


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(found, Values):
        return found.holds(expected)
    if isinstance(found, float) and expected in ("nan", "inf", "-inf"):
        expected = float(expected)
    if isinstance(expected, int | float) and isinstance(found, int | float):
        both_nan = math.isnan(expected) and math.isnan(found)
        return both_nan or expected == found or abs(expected - found) <= TOLERANCE
    return bool(expected == found)
