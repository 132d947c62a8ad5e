"""Content of what a cell starts from: hashes of weights and data, or a note that they are not here."""

from collections.abc import Callable
from pathlib import Path

from morebench.config.schema import ImagePolicy, Paths, TaskData, TrainingData, Weights
from morebench.data.check import peek_hash
from morebench.evaluation.records import task_hash
from morebench.models.weights import absence, folder_hash, locate


class Sources:
    """Looks each source up once; `missing` says what is not on this machine, and what to do about it.

    The id of a run whose sources are missing is provisional: it names the source instead of its content.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], str] = {}
        self.missing: dict[str, None] = {}  # an ordered set of sentences

    def weights(self, weights: Weights, paths: Paths) -> str:
        def look() -> str | None:
            folder = locate(weights, paths)
            return None if folder is None else folder_hash(folder, Path(paths.cache))

        return self._hash(("weights", str(weights)), look, lambda: f"weights: {absence(weights, paths)}")

    def data(self, data: TrainingData, paths: Paths, policy: ImagePolicy) -> str:
        return self._hash(
            ("data", data.folder, data.records, policy.name),
            lambda: peek_hash(data, paths, policy),
            lambda: _no_file(
                data.label, Path(paths.data) / data.folder, data.records, data.build is not None
            ),
        )

    def task(self, data: TaskData, paths: Paths) -> str:
        return self._hash(
            ("task", data.folder, str(data.records), str(data.config), str(data.split)),
            lambda: task_hash(data, paths),
            lambda: _no_file(
                data.hub_id or data.folder,
                Path(paths.data) / data.folder,
                data.records or "a copy of the hub's data set",
                data.build is not None,
            ),
        )

    def _hash(self, key: tuple[str, ...], look: Callable[[], str | None], absence: Callable[[], str]) -> str:
        if key not in self._known:
            found = look()
            if found is None:
                self.missing[absence()] = None
            self._known[key] = found or f"not here: {key[:3]}"
        return self._known[key]


def _no_file(label: str, folder: Path, wanted: str, is_built: bool) -> str:
    if is_built and not folder.exists():
        return f"data: {folder} is not built yet."
    mend = (
        "Delete the folder to have it built again"
        if is_built
        else "Put the published files there, or set paths.data"
    )
    if not folder.is_dir():
        found = "does not exist"
    else:
        found = "does not hold it" if any(folder.iterdir()) else "is empty"
    return f"data: {label}: expected {wanted} in {folder}, which {found}. {mend}."
