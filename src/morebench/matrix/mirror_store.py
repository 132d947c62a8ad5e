"""MLflow's side of the mirror: a store that many processes may open at once, and runs found by their tags.

mlflow takes seconds to import, so only functions that talk to a store import it.
"""

import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import run
from sys import executable
from typing import TYPE_CHECKING

from morebench.config.schema import Tracking
from morebench.errors import RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "morebench.run_id"
PARENT_TAG = "mlflow.parentRunId"
LOCK_SECONDS = 120.0
ENVIRONMENT = {
    # Our own loop retries with growing pauses; mlflow's would hold the thread for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
CREATE_STORE = """
import sys
from mlflow import MlflowClient
uri, experiment, artefacts = sys.argv[1:]
MlflowClient(tracking_uri=uri).create_experiment(experiment, artifact_location=artefacts)
"""


def load_mlflow(uri: str) -> None:
    """Import mlflow and the store behind `uri`: 3 to 4 s, once a process. For the main thread only.

    A thread that imports while the main thread does can hand either a half-made module (seen: `partially
    initialized module 'mlflow'`), and changing the environment beside running C code is unsafe.
    """
    set_environment()
    from mlflow import MlflowClient  # noqa: F401

    if uri.startswith("http"):
        import mlflow.store.tracking.rest_store
    else:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def set_environment() -> None:
    """What the user has set stays, except that nothing is ever sent to mlflow's makers."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def redact(text: str) -> str:
    """`text` without the user and password of any URL, and without secrets in its query."""
    text = re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret|api_?key)=)[^&\s'\"]+", r"\1***", text)


def prepare(tracking: Tracking) -> None:
    """Make the sqlite store, once, before many processes open it. Servers and `null` need nothing.

    Eight processes opening a *new* store at once break it for good (each runs the migrations), so it is
    built aside under a lock file and renamed. Raises RunError.
    """
    database = sqlite_file(tracking.uri)
    if database is None or _is_initialised(database):
        return
    assert tracking.uri is not None
    set_environment()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(f"{database.name}.lock")):
            if not _is_initialised(database):
                _create(database, tracking.experiment)
    except OSError as error:
        raise RunError(
            f"tracking.uri: cannot write {database} ({error}). Choose a folder you may write to, "
            "or tracking.uri=null to go without MLflow."
        ) from error


def sqlite_file(uri: str | None) -> Path | None:
    """The file of a sqlite URI; None for servers, for other databases and for no tracking."""
    prefix = "sqlite:///"
    if uri is None or not uri.startswith(prefix):
        return None
    return Path(uri.removeprefix(prefix).split("?")[0]).absolute()


def _is_initialised(database: Path) -> bool:
    """Asks sqlite itself: importing mlflow to ask costs seconds at every launch."""
    if not database.is_file() or database.stat().st_size == 0:
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT version_num FROM alembic_version").fetchone() is not None
    except sqlite3.Error:
        return False


def _create(database: Path, experiment: str) -> None:
    """In a process of its own: migrations take over the logging of the process they run in."""
    aside = database.with_name(f"{database.name}.new-{os.getpid()}")
    aside.unlink(missing_ok=True)
    arguments = [f"sqlite:///{aside}", experiment, _artefact_root(database)]
    done = run([executable, "-c", CREATE_STORE, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"tracking.uri: mlflow could not make {database}: {redact(last_line)}")
    aside.replace(database)


def _artefact_root(database: Path) -> str:
    """Absolute: mlflow's default is `mlruns` below whatever folder the process happens to run in."""
    return database.with_name(f"{database.name}.artefacts").as_uri()


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """O_EXCL, because flock is unreliable on network file systems. Raises RunError when it stays taken."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with os.fdopen(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as stream:
                stream.write(f"{socket.gethostname()} {os.getpid()}")
            break
        except FileExistsError:
            _remove_if_dead(lock)
        if time.monotonic() > deadline:
            raise RunError(
                f"{lock} is still there after {LOCK_SECONDS:.0f} s. If no launch is running, remove it."
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _remove_if_dead(lock: Path) -> None:
    """A killed owner leaves its lock behind; whether it lives can only be asked on its own host."""
    try:
        host, _, pid = lock.read_text().partition(" ")
        if host == socket.gethostname() and pid.isdigit():
            os.kill(int(pid), 0)
    except ProcessLookupError:
        lock.unlink(missing_ok=True)
    except (FileNotFoundError, PermissionError):
        pass  # just released; or alive and owned by another user


def check_store(tracking: Tracking) -> None:
    """One request; raises whatever mlflow raises when the store does not answer."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking.uri).search_experiments(max_results=1)


def open_experiment(client: "MlflowClient", tracking: Tracking) -> str:
    """The id of the MLflow experiment, made when missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        database = sqlite_file(tracking.uri)
        place = None if database is None else _artefact_root(database)
        try:
            return client.create_experiment(tracking.experiment, artifact_location=place)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(tracking.experiment)
            if found is None:
                raise
    return str(found.experiment_id)


def find_or_create(
    client: "MlflowClient",
    experiment_id: str,
    key: str,
    name: str,
    tags: Mapping[str, str],
    start_time: int | None = None,
) -> tuple["Run", bool]:
    """The run tagged `key`, and whether it was made just now.

    MLflow has no "create unless there": of two processes that both create, the later one deletes its own.
    """
    if (found := _oldest(client, experiment_id, key)) is not None:
        return found, False
    made = client.create_run(experiment_id, start_time, {RUN_ID_TAG: key, **tags}, run_name=name)
    oldest = _oldest(client, experiment_id, key) or made
    if oldest.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
        return oldest, False
    return made, True


def _oldest(client: "MlflowClient", experiment_id: str, key: str) -> "Run | None":
    runs = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{key}'")
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def settle_parent(client: "MlflowClient", experiment_id: str, parent_id: str) -> None:
    """A parent runs while a child runs, and ends as badly as its worst child."""
    children = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent_id}'")
    statuses = {child.info.status for child in children}
    worst = next(s for s in ("RUNNING", "FAILED", "KILLED", "FINISHED") if s in statuses | {"FINISHED"})
    if worst == "RUNNING":
        client.update_run(parent_id, status="RUNNING")
    else:
        client.set_terminated(parent_id, worst)
