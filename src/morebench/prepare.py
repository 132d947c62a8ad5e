"""Build the data and the tiny parts that cells start from and that are not here yet, and check that data."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from morebench.config.compose import build
from morebench.config.schema import Config, Paths, Step, TaskData, Tracking, TrainingData, UncheckedData
from morebench.data.checked import Status, changed_images_problem, data_state, open_checked
from morebench.data.checked import told as told_counts
from morebench.data.checking.check import check_data
from morebench.errors import ConfigError, DataError, RunError, join_problems, resumable
from morebench.evaluation import hub
from morebench.models.weights import built_folder
from morebench.processes import usable_cores


def prepare(configs: Iterable[Config]) -> None:
    """Call every `build` recipe whose folder does not exist, one process each, as many as there are cores.

    Fetches benchmark records where `download=true`. What was built here, or is not checked where
    `unchecked_data=check`, is then checked. Raises ConfigError or RunError before anything is built when no
    run could start afterwards, DataError for data that cannot be had or checked.
    """
    configs = list(configs)
    for config in configs:
        check_tracking(config.tracking)
        check_writable(Path(config.paths.runs))
    if missing := {folder: recipe for folder, recipe in _recipes(configs) if not folder.exists()}:
        _build_all(missing)
    download_missing(configs)
    _check_data(configs)


def _build_all(missing: Mapping[Path, Mapping[str, Any]]) -> None:
    print(f"building {', '.join(folder.name for folder in missing)}", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    with ProcessPoolExecutor(usable_cores(), mp_context=context, initializer=_one_thread) as pool:
        jobs = {pool.submit(_build, dict(recipe), folder): folder for folder, recipe in missing.items()}
        for job in as_completed(jobs):
            job.result()
            print(f"built {jobs[job].name} after {time.monotonic() - begun:.0f} s", file=sys.stderr)


def download_missing(configs: Sequence[Config]) -> None:
    """Benchmark records that are not here, where `download=true`: run ids are made of their content."""
    todo: dict[str, tuple[TaskData, Paths]] = {}
    for config in configs:
        if config.download and Step.evaluate in config.stage.steps:
            for task in config.suite.tasks.values():
                if task.data.records is None:
                    todo[str(task.data)] = task.data, config.paths
    problems = []
    for data, paths in todo.values():
        try:
            if hub.find_place(data, paths) is None:
                _say(f"downloading {data.hub_id}")
                with resumable(Path("the Hugging Face cache")):
                    hub.download(data)
        except DataError as error:
            problems.append(f"{data.hub_id}: {error}")
    if problems:
        raise DataError(join_problems(problems))


def _check_data(configs: Sequence[Config]) -> None:
    """Stale data that was built here is not looked at: somebody has changed it."""
    todo = {}
    for config in configs:
        for data in _training_data(config):
            status = data_state(data, config.paths).status
            own = data.build is not None and status is Status.unchecked
            told = config.unchecked_data is UncheckedData.check
            if own or (told and status in (Status.unchecked, Status.stale)):
                todo[data.folder, data.records] = data, config.paths
    problems = []
    for data, paths in todo.values():
        try:
            with resumable(Path(paths.checks), Path(paths.cache)):
                manifest = check_data(data, paths, usable_cores(), _say).data.manifest
            reasons = f": {told_counts(manifest.quarantined)}" if manifest.quarantined else ""
            share = f"{manifest.num_quarantined:,} of {manifest.num_records:,}"
            _say(f"checked {data.label}: {share} quarantined{reasons}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems(problems))


def changed_data(configs: Iterable[Config]) -> list[str]:
    """A sentence for every checked data set whose images are no longer those that were checked."""
    distinct = {
        (data.folder, data.records): (data, config.paths)
        for config in configs
        for data in (config.pretrain_data, config.finetune_data)
        if data_state(data, config.paths).status is Status.checked
    }
    problems = []
    for data, paths in distinct.values():
        if changed := open_checked(data, paths).changed_images():
            problems.append(changed_images_problem(data, changed))
    return problems


def check_tracking(tracking: Tracking) -> None:
    """A password in the address would be written into the config.yaml of every run."""
    if tracking.uri and urlsplit(tracking.uri).password:
        raise ConfigError(
            "tracking.uri holds a password. Give it in the environment: MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or PGPASSWORD for a database."
        )


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}). Name a folder that can be: paths.runs=FOLDER"
        ) from error


def _recipes(configs: Sequence[Config]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """LLMs first: they take longest, and the rest fills up the other cores."""
    starts = [(config.llm.weights, config.paths) for config in configs]
    starts += [(config.vision.weights, config.paths) for config in configs]
    for weights, paths in starts:
        if weights.build is not None:
            yield built_folder(weights, paths), weights.build
    for config in configs:
        tasks: list[TrainingData | TaskData] = [task.data for task in config.suite.tasks.values()]
        for data in [*_training_data(config), *tasks]:
            if data.build is not None:
                yield Path(config.paths.data) / data.folder, data.build


def _training_data(config: Config) -> list[TrainingData]:
    """None where a given run is only evaluated, perhaps on another machine than the one that trained it."""
    if config.parent is not None and config.stage.steps == [Step.evaluate]:
        return []
    return [config.pretrain_data, config.finetune_data]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def _build(recipe: dict[str, Any], folder: Path) -> None:
    build(recipe, folder=folder)
