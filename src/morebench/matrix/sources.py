"""Content of what a cell starts from: hashes of weights and data, or a note that they are not here."""

from pathlib import Path

from morebench.config.schema import ImagePolicy, Paths, TaskData, TrainingData, Weights
from morebench.data.check import peek_hash, peek_task_hash
from morebench.models.weights import built_folder, folder_hash, locate


class Sources:
    """Looks each source up once; `missing` says what is not on this machine, and what to do about it.

    The id of a run whose sources are missing is provisional: it names the source instead of its content.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], str] = {}
        self.missing: dict[str, None] = {}  # an ordered set of sentences

    def weights(self, weights: Weights, paths: Paths) -> str:
        key = ("weights", str(weights))
        if key not in self._known:
            folder = locate(weights, paths)
            if folder is None:
                self._known[key] = f"not here: {weights.hub_id}@{weights.revision} {weights.build}"
                self.missing[_missing_weights(weights, paths)] = None
            else:
                self._known[key] = folder_hash(folder, Path(paths.cache))
        return self._known[key]

    def data(self, data: TrainingData, paths: Paths, policy: ImagePolicy) -> str:
        key = ("data", data.folder, data.records, policy.name)
        if key not in self._known:
            found = peek_hash(data, paths, policy)
            if found is None:
                records = Path(paths.data) / data.folder / data.records
                self.missing[f"data: {records} does not exist. Put the published files there, or set paths.data."] = None
            self._known[key] = found or f"not here: {data.folder}/{data.records}"
        return self._known[key]

    def task(self, data: TaskData, paths: Paths) -> str:
        key = ("task", str(data), data.folder, str(data.records))
        if key not in self._known:
            found = peek_task_hash(data, paths)
            if found is None:
                place = Path(paths.data) / data.folder / (data.records or "")
                self.missing[f"task data: {data.hub_id or data.records} is not at {place}."] = None
            self._known[key] = found or f"not here: {data.hub_id}@{data.revision} {data.records}"
        return self._known[key]


def _missing_weights(weights: Weights, paths: Paths) -> str:
    if weights.build is not None:
        return f"weights: {built_folder(weights, paths)} is not built yet."
    place = Path(paths.weights) / str(weights.hub_id)
    return f"weights: {weights.hub_id} is neither at {place} nor in the Hugging Face cache. Download it there first."


