"""State on disk: what a folder says about its run, and that a lock has one owner."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from morebench.errors import EXIT_INTERRUPTED, EXIT_USER, RunError
from morebench.matrix import ledger
from morebench.matrix.ledger import State


def test_states(tmp_path):
    assert ledger.state(tmp_path) is State.missing
    with ledger.locked(tmp_path) as me:
        assert ledger.state(tmp_path) is State.running
        number = ledger.begin_attempt(tmp_path, me)
    assert ledger.state(tmp_path) is State.interrupted  # begun, never ended: killed
    ledger.end_attempt(tmp_path, number, EXIT_INTERRUPTED, "asked to stop")
    assert ledger.state(tmp_path) is State.interrupted
    ledger.end_attempt(tmp_path, number, EXIT_USER, "no such image")
    assert ledger.state(tmp_path) is State.failed
    assert ledger.last_message(tmp_path) == "no such image"
    (tmp_path / "projector.safetensors").write_bytes(b"weights")
    ledger.mark_done(tmp_path, [tmp_path / "projector.safetensors"])
    assert ledger.state(tmp_path) is State.done


def test_done_is_not_believed_without_its_files(tmp_path):
    artefact = tmp_path / "llm.safetensors"
    artefact.write_bytes(b"12345")
    ledger.mark_done(tmp_path, [artefact])
    assert ledger.is_done(tmp_path)
    artefact.write_bytes(b"123")
    assert not ledger.is_done(tmp_path)
    artefact.unlink()
    assert not ledger.is_done(tmp_path)


def test_a_damaged_done_names_itself(tmp_path):
    (tmp_path / "DONE").write_text("{")
    with pytest.raises(RunError, match="DONE is damaged"):
        ledger.is_done(tmp_path)


def test_a_held_lock_is_refused_and_released(tmp_path):
    with ledger.locked(tmp_path):
        with pytest.raises(RunError, match=f"process {os.getpid()}"), ledger.locked(tmp_path):
            pass
        assert ledger.owner(tmp_path) is not None
    assert ledger.owner(tmp_path) is None


def test_a_killed_owner_leaves_a_lock_that_is_taken_over(tmp_path):
    code = "import sys,time; from pathlib import Path; from morebench.matrix import ledger\n"
    code += "with ledger.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert ledger.state(tmp_path) is State.running
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ledger.state(tmp_path) is State.interrupted
    with ledger.locked(tmp_path) as me:
        assert ledger.owner(tmp_path) == me


def test_a_later_process_with_the_same_pid_is_not_the_owner(tmp_path):
    stale = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1", "token": "x"}
    (tmp_path / "LOCK").write_text(json.dumps(stale))
    assert ledger.state(tmp_path) is State.interrupted


def test_another_hosts_lock_is_respected(tmp_path):
    theirs = {"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}
    (tmp_path / "LOCK").write_text(json.dumps(theirs))
    with pytest.raises(RunError, match="on elsewhere"), ledger.locked(tmp_path):
        pass
    assert json.loads((tmp_path / "LOCK").read_text()) == theirs


def _try_lock(folder, go, got):
    go.wait()
    try:
        with ledger.locked(folder):
            got.put(True)
            time.sleep(0.5)
    except RunError:
        got.put(False)


def test_one_of_many_gets_the_lock(tmp_path):
    (tmp_path / "LOCK").write_text(
        json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1", "token": "stale"})
    )
    context = multiprocessing.get_context("fork")
    go, got = context.Event(), context.Queue()
    processes = [context.Process(target=_try_lock, args=(tmp_path, go, got)) for _ in range(8)]
    for process in processes:
        process.start()
    go.set()
    assert sum(got.get(timeout=20) for _ in processes) == 1
    for process in processes:
        process.join()


def test_a_torn_attempt_line_is_ignored(tmp_path):
    (tmp_path / "ATTEMPTS.jsonl").write_text(
        '{"attempt": 1, "exit_code": 1, "message": "x"}\n{"attempt": 2, "be'
    )
    assert ledger.state(tmp_path) is State.failed
    ledger.end_attempt(tmp_path, 3, 1, "y")
    assert [line["attempt"] for line in ledger.attempts(tmp_path)] == [1, 3]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "manifest.json"
    ledger.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        ledger.write_json(path, {"a": object()})
    assert ledger.read_json(path) == {"a": 1}
