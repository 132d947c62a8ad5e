"""Brings the MLflow run of one run folder up to date. Used by the thread of a live step and by `sync`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from morebench.config.schema import Tracking
from morebench.matrix import mirror_source as source
from morebench.matrix.mirror_source import MetricsTail, Names, Point
from morebench.matrix.mirror_store import PARENT_TAG, find_or_create, open_experiment, prepare, settle_parent

if TYPE_CHECKING:
    from mlflow.entities import Run

MAX_METRICS = 1000  # MLflow's limits for one batch
MAX_PARAMS = 100
MIRRORED_TAG = "morebench.mirrored"
LEVEL_TAG = "morebench.level"


class Shipper:
    """Holds one open MLflow run and its parents; `open` before anything else. Every call may raise, and then
    the object is to be thrown away: a request that failed may still have been stored, so the next Shipper
    asks MLflow what it holds.
    """

    def __init__(self, tracking: Tracking, folder: Path, names: Names) -> None:
        self._tracking = tracking
        self._folder = folder
        self._names = names
        self._tail = MetricsTail(folder)
        self._known: dict[str, set[int]] = {}  # metric -> steps that MLflow holds
        self._params_sent = False
        self._parents: list[Run] = []  # experiment, cell
        self.num_points = 0  # shipped by this object

    def open(self) -> None:
        """Find or make the runs: (experiment >) cell > step."""
        from mlflow import MlflowClient

        prepare(self._tracking)
        self._client = MlflowClient(tracking_uri=self._tracking.uri)
        self._experiment_id = open_experiment(self._client, self._tracking)
        names, experiment = self._names, self._names.experiment or self._tracking.experiment
        if experiment != self._tracking.experiment:  # otherwise the MLflow experiment itself is that level
            self._parents.append(self._level("experiment", f"experiment:{experiment}", experiment)[0])
        self._parents.append(self._level("cell", f"cell:{experiment}/{names.cell}", names.cell)[0])
        self._run, self._is_new = self._level("step", self._folder.name, names.step)

    def _level(self, level: str, key: str, name: str) -> "tuple[Run, bool]":
        tags = {LEVEL_TAG: level, "morebench.cell": self._names.cell, "morebench.step": self._names.step}
        if level != "step":
            tags = {LEVEL_TAG: level}
        if self._parents:
            tags[PARENT_TAG] = self._parents[-1].info.run_id
        start = source.started_ms(self._folder) if level == "step" else None
        return find_or_create(self._client, self._experiment_id, key, name, tags, start)

    def mark_running(self) -> None:
        """A resumed run runs again, and so do its parents."""
        for run in (*self._parents, self._run):
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")

    def ship(self) -> None:
        """Params, once, and the points of metrics.jsonl that MLflow does not hold."""
        if not self._params_sent and (params := source.step_params(self._folder, self._names.step)):
            self._send_params(self._parents[-1], source.cell_params(self._folder))
            self._send_params(self._run, params)
            self._params_sent = True
        self._send_points([point for point in self._tail.new_points() if self._is_missing(point)])

    def _send_params(self, run: "Run", params: dict[str, str]) -> None:
        """A param cannot be changed: what a resumed run or a sibling already has is left alone."""
        from mlflow.entities import Param

        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for start in range(0, len(missing), MAX_PARAMS):
            chunk = missing[start : start + MAX_PARAMS]
            self._client.log_batch(run.info.run_id, params=chunk, synchronous=True)

    def _is_missing(self, point: Point) -> bool:
        if point.key not in self._known:
            history = (
                [] if self._is_new else self._client.get_metric_history(self._run.info.run_id, point.key)
            )
            self._known[point.key] = {metric.step for metric in history}
        if point.step in self._known[point.key]:
            return False
        self._known[point.key].add(point.step)
        return True

    def _send_points(self, points: Sequence[Point]) -> None:
        """The time of a point follows from the file alone, so MLflow drops a point that two shippers send."""
        from mlflow.entities import Metric

        began = self._run.info.start_time
        metrics = [Metric(point.key, point.value, began + point.elapsed_ms, point.step) for point in points]
        for start in range(0, len(metrics), MAX_METRICS):
            chunk = metrics[start : start + MAX_METRICS]
            self._client.log_batch(self._run.info.run_id, metrics=chunk, synchronous=True)
            self.num_points += len(chunk)

    def is_up_to_date(self, status: str | None) -> bool:
        return bool(self._run.data.tags.get(MIRRORED_TAG) == source.content_digest(self._folder, status))

    def finish(self, status: str | None) -> None:
        """Everything; None leaves the MLflow status alone (the run is alive elsewhere).

        metrics.jsonl is read from its start again: a resume may have cut it and written past the old end
        between two looks, and then the tail began in mid-line.
        """
        run_id, digest = self._run.info.run_id, source.content_digest(self._folder, status)
        self._tail = MetricsTail(self._folder)
        self.ship()
        self._send_results()
        for name, text in source.artefacts(self._folder).items():
            self._client.log_text(run_id, text, name)
        if status is not None:
            self._client.set_terminated(run_id, status, source.ended_ms(self._folder))
            for parent in reversed(self._parents):
                settle_parent(self._client, self._experiment_id, parent.info.run_id)
        self._client.set_tag(run_id, MIRRORED_TAG, digest)

    def _send_results(self) -> None:
        """Scores may be recomputed: MLflow shows the latest, so a changed one is sent with a later time."""
        from mlflow.entities import Metric

        held = self._client.get_run(self._run.info.run_id).data.metrics
        results = source.result_metrics(self._folder).items()
        now = source.results_ms(self._folder)
        changed = [Metric(key, value, now, 0) for key, value in results if held.get(key) != value]
        for start in range(0, len(changed), MAX_METRICS):
            chunk = changed[start : start + MAX_METRICS]
            self._client.log_batch(self._run.info.run_id, metrics=chunk, synchronous=True)
            self.num_points += len(chunk)
