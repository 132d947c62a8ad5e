"""Copies run folders to MLflow. The folders are the truth: MLflow may be away, slow or gone, no step waits
for it and nothing is lost, because `sync` replays whatever MLflow does not hold yet.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from morebench.config.schema import Tracking
from morebench.errors import ConfigError, MorebenchError, join_problems
from morebench.matrix import mirror_source as source
from morebench.matrix.mirror_source import Names
from morebench.matrix.mirror_store import check_store, load_mlflow, prepare, redact
from morebench.matrix.shipper import Shipper

__all__ = ["Mirror", "Synced", "prepare", "sync"]

POLL_SECONDS = 3.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

log = logging.getLogger(__name__)


class Mirror:
    """Ships one run folder from a daemon thread while the step runs. Only rank 0 makes one."""

    def __init__(
        self,
        tracking: Tracking,
        run_folder: Path,
        cell_name: str,
        step_name: str,
        experiment_name: str | None,  # a file in experiments/; None: a cell on its own
    ) -> None:
        self._tracking = tracking
        self._folder = run_folder
        self._names = Names(cell_name, step_name, experiment_name)
        self._status: str | None = None  # set once, by close
        self._wake = Event()
        self._give_up = Event()
        self._landed = False
        self._thread = Thread(target=self._run, name="mlflow-mirror", daemon=True)

    def start(self) -> None:
        source.write_names(self._folder, self._names)  # without a URI too: a later `sync` may have one
        if self._tracking.uri is None:
            return
        try:
            load_mlflow(self._tracking.uri)
        except Exception as error:
            log.warning("mlflow cannot be imported (%s). The run goes on without it.", error)
            return
        self._thread.start()

    def close(self, timeout: float = 20.0, status: str = "FINISHED") -> bool:
        """Flush and end the MLflow run as FINISHED, FAILED or KILLED, in `timeout` seconds at most.

        Returns whether MLflow holds everything; if not, `sync` will bring the rest.
        """
        if self._tracking.uri is None:
            return True
        self._status = status
        self._wake.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout)
        self._give_up.set()
        if not self._landed:
            log.warning(
                "MLflow does not hold all of %s. `python -m morebench.track sync` brings the rest.",
                self._folder.name,
            )
        return self._landed

    def _run(self) -> None:
        shipper: Shipper | None = None
        pause = FIRST_PAUSE_SECONDS
        is_reported = False
        while not self._give_up.is_set():
            status = self._status
            try:
                if shipper is None:
                    fresh = Shipper(self._tracking, self._folder, self._names)
                    fresh.open()
                    fresh.mark_running()
                    shipper = fresh
                if status is not None:
                    shipper.finish(status)
                    self._landed = True
                    return
                shipper.ship()
                pause = FIRST_PAUSE_SECONDS
                self._wake.wait(POLL_SECONDS)
            except Exception as error:  # whatever it is, the step goes on
                shipper = None
                if not is_reported and not self._give_up.is_set():
                    log.warning("%s The run goes on without it.", _problem(self._tracking, error))
                    is_reported = True
                if status is None:
                    self._wake.wait(pause)
                else:
                    self._give_up.wait(min(pause, FIRST_PAUSE_SECONDS))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@dataclass(frozen=True)
class Synced:
    num_runs: int
    num_up_to_date: int
    num_points: int  # metric values that MLflow did not hold
    unknown: tuple[str, ...]  # folders that no Mirror was started for


def sync(runs: Path, tracking: Tracking) -> Synced:
    """Replay every run folder into MLflow; what is there already is not sent again.

    Raises ConfigError without a URI, MorebenchError when MLflow does not answer or refuses a run.
    """
    if tracking.uri is None:
        raise ConfigError("tracking.uri is null, so there is no MLflow to sync to. Set tracking.uri=...")
    load_mlflow(tracking.uri)
    try:
        prepare(tracking)
        check_store(tracking)
    except MorebenchError:
        raise
    except Exception as error:
        raise MorebenchError(_problem(tracking, error)) from error
    num_runs = num_up_to_date = num_points = 0
    unknown, problems = [], []
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        names = source.read_names(folder)
        if names is None:
            unknown.append(folder.name)
            continue
        num_runs += 1
        status = source.status_on_disk(folder)
        try:
            shipper = Shipper(tracking, folder, names)
            shipper.open()
            if shipper.is_up_to_date(status):
                num_up_to_date += 1
                continue
            shipper.finish(status)
            num_points += shipper.num_points
        except Exception as error:  # one damaged folder does not keep the others from MLflow
            problems.append(f"{folder.name}: {_problem(tracking, error)}")
    if problems:
        raise MorebenchError(join_problems(problems))
    return Synced(num_runs, num_up_to_date, num_points, tuple(unknown))


def _problem(tracking: Tracking, error: Exception) -> str:
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"MLflow at {redact(str(tracking.uri))}: {redact(message)[:300]}."
