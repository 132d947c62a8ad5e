"""Content of what a cell starts from: hashes of weights and data, or a note that they are not here."""

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from morebench.config.compose import compose_config
from morebench.config.schema import Config, Paths, TaskData, TrainingData, Weights
from morebench.data.checked import DataState, Status, data_state, usability_problems
from morebench.errors import DataError
from morebench.evaluation import hub
from morebench.evaluation.records import task_hash
from morebench.models.weights import absence, folder_hash, locate


class Sources:
    """Looks each source up once; `missing` says what is not on this machine, and what to do about it.

    The id of a run whose sources are missing is provisional: it names the source instead of its content.
    `unusable` says why no cell should be trained on data that is here and was checked.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], str] = {}
        self.missing: dict[str, None] = {}  # an ordered set of sentences
        self.unusable: dict[str, None] = {}
        self.data_states: dict[tuple[str, ...], DataState] = {}

    def weights(self, weights: Weights, paths: Paths) -> str:
        def look() -> str | None:
            folder = locate(weights, paths)
            return None if folder is None else folder_hash(folder, Path(paths.cache))

        return self._hash(("weights", str(weights)), look, lambda: f"weights: {absence(weights, paths)}")

    def data(self, group: str, choice: str, config: Config) -> str:
        """`group` is pretrain_data or finetune_data, `choice` the file in it."""
        data: TrainingData = getattr(config, group)
        key = ("data", data.folder, data.records, f"{data.also_quarantine} {data.allowed_links}")

        def look() -> str | None:
            self.data_states[key] = state = data_state(data, config.paths)
            if state.manifest is None or state.status is not Status.checked:
                return None
            return state.manifest.content_hash

        def absence() -> str:
            state = self.data_states[key]
            if state.status is Status.absent:
                folder = Path(config.paths.data) / data.folder
                return _no_file(data.label, folder, data.records, data.build is not None)
            mend = (
                f"Run `{_check_command(group, choice, data)}`, or have it checked first: unchecked_data=check"
            )
            return f"data: {data.label}: {state.reason}. {mend}"

        found = self._hash(key, look, absence)
        manifest = self.data_states[key].manifest
        if manifest is not None and self.data_states[key].status is Status.checked:
            problems = usability_problems(manifest, data, config.paths, config.max_quarantined)
            self.unusable.update(dict.fromkeys(problems))
        return found

    def task(self, name: str, data: TaskData, paths: Paths) -> str:
        problem: str | None = None

        def look() -> str | None:
            nonlocal problem
            try:
                return task_hash(data, paths)
            except DataError as error:  # one of several tasks, perhaps: all are named at once
                problem = f"{name}: {error}"
                return None

        def absence() -> str:
            if problem is not None or data.records is None:
                return problem or f"{name}: {hub.absence(data, paths)}"
            folder = Path(paths.data) / data.folder
            return _no_file(data.folder, folder, data.records, data.build is not None)

        return self._hash(("task", data.folder, str(data)), look, absence)

    def _hash(self, key: tuple[str, ...], look: Callable[[], str | None], absence: Callable[[], str]) -> str:
        if key not in self._known:
            found = look()
            if found is None:
                self.missing[absence()] = None
            self._known[key] = found or f"not here: {key[:3]}"
        return self._known[key]


def _check_command(group: str, choice: str, data: TrainingData) -> str:
    """With what was overridden of the choice's file."""
    words = ["python -m morebench.data check", f"{group}={choice}"]
    plain = getattr(compose_config([f"{group}={choice}"]).config, group)
    for field in fields(data):
        value = getattr(data, field.name)
        if value == getattr(plain, field.name) or field.name in ("label", "assumed_lengths", "build"):
            continue
        text = f"[{','.join(value)}]" if isinstance(value, list) else f"{'null' if value is None else value}"
        words.append(shlex.quote(f"{group}.{field.name}={text}"))
    return " ".join(words)


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
