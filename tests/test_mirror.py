"""MLflow is a mirror: nothing is lost, nothing is doubled, nobody waits. Real stores and a real server."""

import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from factories_training import make_cell

from morebench.config.compose import save_config
from morebench.config.schema import Config, Tracking
from morebench.errors import ConfigError, MorebenchError, RunError
from morebench.matrix import ledger, mirror, mirror_store
from morebench.matrix.mirror import Mirror, prepare, sync
from morebench.matrix.mirror_source import NAMES_FILE, MetricsTail, Names
from morebench.matrix.mirror_store import load_mlflow, redact
from morebench.matrix.shipper import Shipper
from morebench.matrix.step import execute
from morebench.track import command as track
from morebench.training.telemetry import MetricsFile

AXES = {
    "llm": "gemma2_tiny",
    "vision": "clip_tiny",
    "resolution": "native",
    "pretrain_data": "digits",
    "seed": 0,
}
CELL = "gemma2_tiny-clip_tiny-native-digits-s0"
NAMES = Names(CELL, "finetune", "digits")
RECIPE = {"trainable": ["projector", "llm"], "global_batch_size": 16, "optimizer": {"lr": 0.001}}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made once; each test has an MLflow experiment of its own in it."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    prepare(Tracking(uri=uri, experiment="first"))
    load_mlflow(uri)  # as a test imports it too: not while a mirror's thread does
    load_mlflow("http://127.0.0.1")
    return uri


@pytest.fixture
def tracking(store: str, request: pytest.FixtureRequest) -> Tracking:
    return Tracking(uri=store, experiment=request.node.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "runs" / f"{CELL}.finetune.0123456789ab")


@pytest.fixture(autouse=True)
def fast_polling(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_SECONDS", 0.5)


def make_folder(folder: Path, uri: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(AXES))
    (folder / "manifest.json").write_text("{}")
    config = {
        "stage": {"finetune": RECIPE, "evaluate": {"profile": "paper"}},
        "projector": {"depth": 2},
        "resolution": {"scales": [1]},
        "tracking": {"uri": uri},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "projector.safetensors").write_bytes(b"weights")
    return folder


def append(folder: Path, steps: range) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 5 - step / 100, "lr": 1e-3, "step_s": 0.5}) + "\n")


def finish(folder: Path) -> None:
    ledger.mark_done(folder, [folder / "config.yaml"])


def runs_of(tracking: Tracking) -> dict[str, list]:
    """Runs by level."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking.uri)
    levels: dict[str, list] = {"experiment": [], "cell": [], "step": []}
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        return levels
    for run in client.search_runs([experiment.experiment_id]):
        levels[run.data.tags["morebench.level"]].append(run)
    return levels


def steps_of(tracking: Tracking, key: str = "train/loss") -> list[int]:
    from mlflow import MlflowClient

    (run,) = runs_of(tracking)["step"]
    history = MlflowClient(tracking_uri=tracking.uri).get_metric_history(run.info.run_id, key)
    return sorted(metric.step for metric in history)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_importing_it_is_light_and_mlflow_never_phones_home():
    """In a process without the variables that make mlflow believe it is being tested."""
    code = """
import sys, time
began = time.perf_counter()
import morebench.matrix.mirror
assert not {"mlflow", "torch", "sqlalchemy"} & sys.modules.keys()
from morebench.matrix.mirror_store import set_environment
set_environment()
from mlflow.telemetry import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled() and get_telemetry_client() is None
"""
    hints = {"CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"}
    env = {name: value for name, value in os.environ.items() if name not in hints}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_a_live_run_arrives_whole(tracking: Tracking, folder: Path):
    live = Mirror(tracking, folder, CELL, "finetune", "digits")
    append(folder, range(10))
    live.start()
    wait_for(lambda: steps_are_there(tracking, 10))
    assert {run.info.status for level in runs_of(tracking).values() for run in level} == {"RUNNING"}
    append(folder, range(10, 1500))  # more than one batch
    finish(folder)
    assert live.close()

    levels = runs_of(tracking)
    (experiment,), (cell,), (step,) = levels["experiment"], levels["cell"], levels["step"]
    assert steps_of(tracking) == steps_of(tracking, "train/lr") == list(range(1500))
    assert cell.data.tags["mlflow.parentRunId"] == experiment.info.run_id
    assert step.data.tags["mlflow.parentRunId"] == cell.info.run_id
    assert [run.info.run_name for run in (experiment, cell, step)] == ["digits", CELL, "finetune"]
    assert {run.info.status for run in (experiment, cell, step)} == {"FINISHED"}
    assert cell.data.params == {key: str(value) for key, value in AXES.items()}
    assert step.data.params.items() >= cell.data.params.items()
    assert step.data.params["optimizer.lr"] == "0.001"
    assert step.data.params["trainable"] == "['projector', 'llm']"
    assert artefacts_of(tracking) == {"cell.json", "config.yaml", "manifest.json"}
    assert live.close(), "closing twice is harmless"


def artefacts_of(tracking: Tracking) -> set[str]:
    from mlflow import MlflowClient

    (run,) = runs_of(tracking)["step"]
    return {file.path for file in MlflowClient(tracking_uri=tracking.uri).list_artifacts(run.info.run_id)}


def test_a_resumed_run_continues_its_mlflow_run(tracking: Tracking, folder: Path):
    first = Mirror(tracking, folder, CELL, "finetune", "digits")
    append(folder, range(20))
    first.start()
    assert first.close(status="KILLED")
    assert runs_of(tracking)["experiment"][0].info.status == "KILLED"

    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:12]))  # back to the checkpoint of step 12
    (folder / "cell.json").write_text(json.dumps(AXES | {"seed": "0 as a later version writes it"}))
    second = Mirror(tracking, folder, CELL, "finetune", "digits")
    second.start()
    wait_for(
        lambda: {run.info.status for level in runs_of(tracking).values() for run in level} == {"RUNNING"}
    )
    append(folder, range(12, 30))
    finish(folder)
    assert second.close()
    assert steps_of(tracking) == list(range(30))
    assert {run.info.status for level in runs_of(tracking).values() for run in level} == {"FINISHED"}


def test_a_file_cut_back_under_a_live_mirror_is_read_again(tracking: Tracking, folder: Path):
    live = Mirror(tracking, folder, CELL, "finetune", "digits")
    append(folder, range(20))
    live.start()
    wait_for(lambda: steps_are_there(tracking, 20))
    (folder / "metrics.jsonl").write_text("")
    append(folder, range(20, 25))
    wait_for(lambda: steps_are_there(tracking, 25))
    longer = "".join(
        json.dumps({"step": step, "loss": 1.0, "padding": 0.015625}) + "\n" for step in range(25)
    )
    (folder / "metrics.jsonl").write_text(longer)  # past the old end at once: the tail is in mid-line
    time.sleep(0.3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 0.1')  # torn: never shipped, never fatal
    assert live.close()
    assert steps_of(tracking) == steps_of(tracking, "train/padding") == list(range(25))


def test_a_line_is_shipped_when_it_is_whole(folder: Path):
    tail = MetricsTail(folder)
    assert not list(tail.new_points())
    for text, steps in [
        ('{"step": 0, "lo', []),
        ('ss": 1}\n{"step": 1', [0]),
        (', "loss": 2, "note": "x"}\n', [1]),
    ]:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(text)
        assert [(point.key, point.step) for point in tail.new_points()] == [
            ("train/loss", step) for step in steps
        ]


def test_results_become_metrics_and_a_new_score_replaces_the_old(tracking: Tracking, folder: Path):
    def write(score: float) -> None:
        tasks = {"digits_vqa": {"n": 600, "metrics": {"exact_match": score, "by_kind": {"where": 0.1}}}}
        blind = {"digits_vqa": {"n": 600, "metrics": {"exact_match": 0.25}}}
        content = {"profile": "paper", "tasks": tasks, "controls": {"blind": blind}, "seconds": 1.5}
        ledger.write_json(folder / "results.json", content)

    def shown() -> dict[str, float]:
        return dict(runs_of(tracking)["step"][0].data.metrics)

    write(0.5)
    live = Mirror(tracking, folder, CELL, "evaluate", "digits")
    live.start()
    assert live.close()
    expected = {"eval/digits_vqa/exact_match": 0.5, "eval/blind/digits_vqa/exact_match": 0.25}
    assert shown() == expected
    time.sleep(0.01)
    write(0.75)
    finish(folder)
    assert sync(folder.parent, tracking).num_points == 1
    assert shown() == expected | {"eval/digits_vqa/exact_match": 0.75}


def test_sync_fills_the_gap_without_doubling(tracking: Tracking, folder: Path):
    append(folder, range(8))
    partly = Shipper(tracking, folder, NAMES)
    partly.open()
    partly.ship()
    append(folder, range(8, 20))
    finish(folder)
    Mirror(Tracking(uri=None, experiment="none"), folder, CELL, "finetune", "digits").start()

    first = sync(folder.parent, tracking)
    assert (first.num_runs, first.num_up_to_date, first.num_points) == (1, 0, 12 * 3)  # loss, lr, step_s
    assert steps_of(tracking) == list(range(20))
    assert runs_of(tracking)["step"][0].info.status == "FINISHED"
    second = sync(folder.parent, tracking)
    assert (second.num_up_to_date, second.num_points) == (1, 0)


def test_sync_takes_the_status_from_disk_and_names_strange_folders(tracking: Tracking, folder: Path):
    Mirror(Tracking(uri=None, experiment="none"), folder, CELL, "finetune", None).start()
    with ledger.locked(folder) as me:
        number = ledger.begin_attempt(folder, me)
    ledger.end_attempt(folder, number, 4, "loss is NaN")
    (folder.parent / "notes").mkdir()
    assert sync(folder.parent, tracking).unknown == ("notes",)
    levels = runs_of(tracking)
    assert levels["step"][0].info.status == levels["cell"][0].info.status == "FAILED"
    assert not levels["experiment"], "without a name the MLflow experiment is the top"


def test_sync_beside_a_live_mirror_stores_each_point_once(tracking: Tracking, folder: Path):
    append(folder, range(10))
    pair = [Shipper(tracking, folder, NAMES) for _ in range(2)]
    for shipper in pair:
        shipper.open()
        shipper._is_new = True  # both asked what MLflow holds before the other shipped
    for shipper in pair:
        shipper.ship()
        time.sleep(0.01)
    assert steps_of(tracking) == list(range(10))


def test_one_damaged_folder_does_not_keep_the_others_away(tracking: Tracking, folder: Path):
    damaged = make_folder(folder.with_name("damaged"))
    for each in (folder, damaged):
        append(each, range(3))
        Mirror(Tracking(uri=None, experiment="none"), each, CELL, "finetune", "digits").start()
    (damaged / "cell.json").write_text("{")
    with pytest.raises(MorebenchError, match=r"damaged: .*cell\.json is damaged"):
        sync(folder.parent, tracking)
    assert folder.name in {run.data.tags["morebench.run_id"] for run in runs_of(tracking)["step"]}


def test_no_secret_leaves_the_machine(tracking: Tracking, tmp_path: Path):
    from mlflow import MlflowClient

    folder = make_folder(tmp_path / "run", uri="https://ann:s3cret@mlflow.example/path")
    shipper = Shipper(tracking, folder, NAMES)
    shipper.open()
    shipper.finish(None)
    client = MlflowClient(tracking_uri=tracking.uri)
    config = Path(
        client.download_artifacts(runs_of(tracking)["step"][0].info.run_id, "config.yaml")
    ).read_text()
    assert "https://mlflow.example/path" in config
    assert "s3cret" not in config


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://ann:pw@host:5000/x", "http://host:5000/x"),
        ("postgresql+psycopg2://ann:p@w@host/db", "postgresql+psycopg2://host/db"),
        ("connect to https://tok3n@host failed", "connect to https://host failed"),
        ("postgresql://host/db?user=ann&password=pw&x=1", "postgresql://host/db?user=ann&password=***&x=1"),
        ("sqlite:////home/ann@work/mlflow.db", "sqlite:////home/ann@work/mlflow.db"),
        ("mail ann@host about http://host/x", "mail ann@host about http://host/x"),
    ],
)
def test_redact(text: str, clean: str):
    assert redact(text) == clean


@pytest.mark.parametrize("uri", [None, "http://127.0.0.1:1", "postgresql://nowhere/db"])
def test_prepare_leaves_everything_but_sqlite_alone(uri: str | None):
    prepare(Tracking(uri=uri, experiment="any"))


def test_prepare_waits_for_a_living_one_then_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mirror_store, "LOCK_SECONDS", 0.3)
    lock = tmp_path / "mlflow.db.lock"
    lock.write_text(f"{socket.gethostname()} {os.getpid()}")
    with pytest.raises(RunError, match=r"mlflow\.db\.lock is still there .* remove it"):
        prepare(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="first"))


def test_prepare_names_a_place_it_cannot_write(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"tracking\.uri: cannot write .*tracking\.uri=null"):
        prepare(Tracking(uri=f"sqlite:///{tmp_path}/file/mlflow.db", experiment="first"))


def ship_from_a_process(uri: str, folder: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    tracking = Tracking(uri=uri, experiment="fresh")
    start.wait()
    prepare(tracking)
    live = Mirror(tracking, folder, CELL, "finetune", "digits")
    live.start()
    append(folder, range(50))
    finish(folder)
    assert live.close(timeout=120)


@pytest.mark.slow
def test_eight_processes_may_open_a_new_store_at_once(tmp_path: Path):
    """Without `prepare` three of three such stores broke for good (mlflow 3.17).

    Here a killed launch has also left its lock and an empty file behind.
    """
    database = tmp_path / "my stores" / "mlflow.db"
    database.parent.mkdir()
    database.touch()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    database.with_name("mlflow.db.lock").write_text(f"{socket.gethostname()} {killed.pid}")
    uri = f"sqlite:///{database}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "mlflow.store.tracking.sqlalchemy_store"])
    start = context.Barrier(8)
    folders = [make_folder(tmp_path / "runs" / f"run{number}") for number in range(8)]
    processes = [context.Process(target=ship_from_a_process, args=(uri, folder, start)) for folder in folders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0] * 8
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", "mlflow.db.artefacts"}
    levels = runs_of(Tracking(uri=uri, experiment="fresh"))
    assert sorted(run.data.tags["morebench.run_id"] for run in levels["step"]) == sorted(
        f.name for f in folders
    )
    assert {run.data.metrics["train/loss"] for run in levels["step"]} == {5 - 49 / 100}
    assert {run.info.status for run in levels["step"]} == {"FINISHED"}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"http://ann:s3cret@127.0.0.1:{listener.getsockname()[1]}"


def test_a_silent_server_delays_nobody(silent_server: str, folder: Path, caplog: pytest.LogCaptureFixture):
    check_delays(silent_server, folder, caplog)


def test_a_dead_server_delays_nobody_and_is_reported_once(folder: Path, caplog: pytest.LogCaptureFixture):
    port = free_port()
    check_delays(f"http://ann:s3cret@127.0.0.1:{port}", folder, caplog)
    assert len([line for line in caplog.messages if f"MLflow at http://127.0.0.1:{port}:" in line]) == 1


def check_delays(uri: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    live = Mirror(Tracking(uri=uri, experiment="any"), folder, CELL, "finetune", "digits")
    began = time.monotonic()
    live.start()
    append(folder, range(3))
    assert time.monotonic() - began < 0.5
    time.sleep(1)
    began = time.monotonic()
    assert not live.close(timeout=1.0, status="FAILED")
    assert 0.9 < time.monotonic() - began < 1.5
    assert "track sync" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


def test_a_run_trains_while_no_request_is_ever_answered(
    silent_server: str, cell: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_without_tracking(silent_server, cell, tmp_path, monkeypatch)


def test_a_run_trains_without_a_server_and_nothing_is_lost(
    tracking: Tracking, cell: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = train_without_tracking(f"http://127.0.0.1:{free_port()}", cell, tmp_path, monkeypatch)
    check_replayed(tracking, folder)


class Proxy:
    """In front of a store: an MLflow server's address, which may answer late or with a closed connection."""

    def __init__(self, delay_s: float) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.delay_s = delay_s
        self.num_asked = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                self.num_asked += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(65536)
            time.sleep(self.delay_s)
            body = b"{}"
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)


def test_a_server_that_answers_ten_seconds_late_holds_no_run_up(
    tracking: Tracking, cell: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    late = Proxy(delay_s=10)
    with late.listener:
        began = time.monotonic()
        folder = train_without_tracking(late.uri, cell, tmp_path, monkeypatch)
        assert time.monotonic() - began < 10, "it has waited for an answer"
    assert late.num_asked
    check_replayed(tracking, folder)


def test_a_server_that_dies_in_mid_run_loses_nothing(
    tracking: Tracking, cell: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the first points have arrived; the run goes on without it."""
    arrived, ship = threading.Event(), Shipper.ship

    def ship_then_die(self: Shipper) -> None:
        if arrived.is_set():
            raise ConnectionError("connection refused")
        ship(self)
        if self.num_points:
            arrived.set()

    append_line = MetricsFile.append

    def append_when_it_is_dead(self: MetricsFile, line: dict[str, Any]) -> None:
        append_line(self, line)
        if line["step"] == 1:
            assert arrived.wait(60)

    monkeypatch.setattr(Shipper, "ship", ship_then_die)
    monkeypatch.setattr(MetricsFile, "append", append_when_it_is_dead)
    assert tracking.uri is not None
    folder = train_without_tracking(tracking.uri, cell, tmp_path, monkeypatch, tracking.experiment)
    num_arrived = len(steps_of(tracking))
    assert 0 < num_arrived < len((folder / "metrics.jsonl").read_text().splitlines())
    monkeypatch.setattr(Shipper, "ship", ship)
    check_replayed(tracking, folder)


def check_replayed(tracking: Tracking, folder: Path) -> None:
    track(
        [
            "sync",
            f"paths.runs={folder.parent}",
            f"tracking.uri={tracking.uri}",
            f"tracking.experiment={tracking.experiment}",
        ]
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(tracking) == steps_of(tracking, "train/step_s") == [line["step"] for line in lines]
    assert runs_of(tracking)["step"][0].info.status == "FINISHED"


def train_without_tracking(
    uri: str, cell: Config, root: Path, monkeypatch: pytest.MonkeyPatch, experiment: str = "any"
) -> Path:
    """That it ends shows that no step waits for an answer; and only the mirror's thread ever asks."""
    askers, opened = set(), Shipper.open

    def noted(self: Shipper) -> None:
        askers.add(threading.current_thread().name)
        opened(self)

    monkeypatch.setattr(Shipper, "open", noted)
    monkeypatch.setattr(Mirror.close, "__defaults__", (0.3, "FINISHED"))
    folder = root / "run"
    folder.mkdir()
    for name, content in [
        ("manifest.json", {"run_id": "run", "step": "pretrain"}),
        ("cell.json", AXES),
        ("parents.json", {}),
    ]:
        ledger.write_json(folder / name, content)
    save_config(replace(cell, tracking=Tracking(uri=uri, experiment=experiment)), folder / "config.yaml")
    assert execute(folder) == (0, "")
    assert ledger.is_done(folder)
    assert askers == {"mlflow-mirror"}
    return folder


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_costs_the_mirror_nothing(tracking: Tracking, folder: Path, days: int):
    """By a day, after the start and again before the end of each of two starts."""
    for steps in (range(5), range(5, 10)):
        live = Mirror(tracking, folder, CELL, "finetune", "digits")
        append(folder, steps)
        live.start()
        wait_for(lambda steps=steps: steps_are_there(tracking, steps.stop))
        then = time.time() + days * 86400
        os.utime(folder / NAMES_FILE, (then, then))
        os.utime(folder / "metrics.jsonl", (then, then))
        if steps.stop == 10:
            finish(folder)
            os.utime(folder / "DONE", (then, then))
        assert live.close(status="FINISHED" if steps.stop == 10 else "KILLED")
    assert steps_of(tracking) == list(range(10))
    assert runs_of(tracking)["step"][0].info.status == "FINISHED"


def test_sync_says_when_nobody_answers(folder: Path):
    port = free_port()
    with pytest.raises(MorebenchError, match=rf"MLflow at http://127\.0\.0\.1:{port}: ") as caught:
        sync(folder.parent, Tracking(uri=f"http://ann:s3cret@127.0.0.1:{port}", experiment="any"))
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tracking\.uri is null"):
        sync(folder.parent, Tracking(uri=None, experiment="any"))


def test_the_run_folder_gets_one_hidden_file(folder: Path):
    before = set(folder.iterdir())
    Mirror(Tracking(uri=None, experiment="any"), folder, CELL, "finetune", "digits").start()
    assert set(folder.iterdir()) - before == {folder / NAMES_FILE}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artefacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        output = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=output, stderr=output, start_new_session=True
        )
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, store: str) -> Iterator[Server]:
    made = Server(tmp_path)
    copyfile(store.removeprefix("sqlite:///"), tmp_path / "server.db")
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_misses_nothing(server: Server, folder: Path):
    tracking = Tracking(uri=server.uri, experiment="served")
    server.start()
    live = Mirror(tracking, folder, CELL, "finetune", "digits")
    live.start()
    append(folder, range(10))
    wait_for(lambda: steps_are_there(tracking, 10))
    server.kill()
    slowest = 0.0
    for step in range(10, 30):
        began = time.monotonic()
        append(folder, range(step, step + 1))
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.05)
    assert slowest < 1.0
    server.start()
    append(folder, range(30, 40))
    finish(folder)
    assert live.close(timeout=120)
    assert steps_of(tracking) == list(range(40))
    assert artefacts_of(tracking) == {"cell.json", "config.yaml", "manifest.json"}
    assert {run.info.status for level in runs_of(tracking).values() for run in level} == {"FINISHED"}


def steps_are_there(tracking: Tracking, num: int) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(runs_of(tracking)["step"]) and len(steps_of(tracking)) == num
    except MlflowException:
        return False
