import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_training import losses, make_cell, metrics, with_trainer
from training_processes import finish, start, train_until_fsync, train_until_line

from morebench.config.schema import Config, Step
from morebench.errors import DiskFullError, Interrupted, RunError
from morebench.training.module import StageModule
from morebench.training.resume import (
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    save_checkpoint,
)
from morebench.training.run import train
from morebench.training.telemetry import MetricsFile, lines_before

TENSORS = {"parameters": {"a": torch.arange(6.0)}, "random": {"cpu": torch.zeros(3, dtype=torch.uint8)}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(config, Step.pretrain, folder, {})
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert [line["step"] for line in metrics(folder)] == list(range(6))
    name = "projector.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_at_a_step_continues_to_the_same_bits(
    config: Config, whole: Path, tmp_path: Path, step: int
) -> None:
    assert finish(start(train_until_line, step, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_killed_while_a_checkpoint_is_written(config: Config, whole: Path, tmp_path: Path) -> None:
    """fsyncs 12 to 17 belong to the second checkpoint: the first must still be there, and be used."""
    assert finish(start(train_until_fsync, 15, config, Step.pretrain, tmp_path)) == [-signal.SIGKILL]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "step_00000002" in names
    assert any(name.startswith(".step_00000004.tmp-") for name in names)
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_killed_again_and_again_ends_in_the_same_bits(config: Config, whole: Path, tmp_path: Path) -> None:
    """Every start gets a little further before it dies, whatever it is writing then."""
    code, count = None, 2
    while code != 0:
        (code,) = finish(start(train_until_fsync, count, config, Step.pretrain, tmp_path))
        assert code in (0, -signal.SIGKILL)
        count += 5
    assert count > 12, "the test must have killed something"
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_saves_at_the_next_step_and_continues(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = [signal.getsignal(known) for known in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]
    with monkeypatch.context() as patch:
        append = MetricsFile.append

        def asking_append(self: MetricsFile, line: dict[str, Any]) -> None:
            append(self, line)
            if line["step"] == 2:
                os.kill(os.getpid(), number)

        patch.setattr(MetricsFile, "append", asking_append)
        with pytest.raises(Interrupted, match=rf"{number.name} asked to stop: saved after 4 of 6"):
            train(config, Step.pretrain, tmp_path, {})
    after = [signal.getsignal(known) for known in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]
    assert after == before
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_signal_in_the_middle_of_accumulation_waits_for_the_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_trainer(config, micro_batch_tokens=300)
    training_step = StageModule.training_step

    def asking_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if self.next_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", asking_step)
    with pytest.raises(Interrupted, match="saved after 2 of 6"):
        train(config, Step.pretrain, tmp_path, {})


def test_threads_and_micro_batches_are_kept_over_a_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`threads: null` means what the machine had when the run began."""
    free = with_trainer(config, threads=None)
    seen = torch.get_num_threads()
    _interrupt_after(1, free, tmp_path, monkeypatch)
    torch.set_num_threads(seen + 1)
    try:
        train(free, Step.pretrain, tmp_path, {})
        assert torch.get_num_threads() == seen + 1
    finally:
        torch.set_num_threads(seen)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["threads"], manifest["anomalies"]) == (seen, [])


def test_resume_with_another_budget_says_that_it_is_not_exact(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(3, config, tmp_path, monkeypatch)
    train(with_trainer(config, micro_batch_tokens=300), Step.pretrain, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["micro_batches"] > 1
    assert manifest["anomalies"] == ["went on after 3 optimizer steps on another machine: not bit-exact"]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_seconds_add_up_over_starts(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_after(3, config, tmp_path, monkeypatch)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", print)
    assert checkpoint is not None
    before = checkpoint.facts["seconds"]
    train(config, Step.pretrain, tmp_path, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["seconds"] > before > 0


def test_killed_after_the_parts_were_written(config: Config, whole: Path, tmp_path: Path) -> None:
    """The checkpoints are still there: the next start removes them and trains nothing."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    save_checkpoint(tmp_path / "checkpoints", 4, TENSORS, {})
    train(config, Step.pretrain, tmp_path, {})
    assert_same(tmp_path, whole)


def test_checkpoint_of_another_model_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(1, config, tmp_path, monkeypatch)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", print)
    assert checkpoint is not None
    parameters = {name: torch.zeros(3) for name in checkpoint.load("parameters")}
    tensors = {**{name: checkpoint.load(name) for name in ("optimizer", "random")}, "parameters": parameters}
    save_checkpoint(tmp_path / "checkpoints", 5, tensors, checkpoint.facts)
    with pytest.raises(RunError, match=r"another model: names or shapes differ at .*Remove the run folder's"):
        train(config, Step.pretrain, tmp_path, {})


def test_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {"seconds": 1.5})
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    assert (found.step, found.facts) == (3, {"seconds": 1.5})
    assert torch.equal(found.load("parameters")["a"], TENSORS["parameters"]["a"])
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in ("", ".safetensors", ".json")]


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000030"]


def test_leftovers_of_killed_starts_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step_00000001.tmp-4711").mkdir()
    save_checkpoint(tmp_path, 2, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_damaged_checkpoint_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 2, TENSORS, {}) / "meta.json").unlink()
    save_checkpoint(tmp_path, 2, TENSORS, {})
    assert newest_checkpoint(tmp_path, print) is not None


@pytest.mark.parametrize("name", ["parameters.safetensors", "random.safetensors", "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, harm: str) -> None:
    good = save_checkpoint(tmp_path, 1, TENSORS, {})
    kept = shutil.copytree(good, tmp_path / "kept")
    bad = save_checkpoint(tmp_path, 2, TENSORS, {})
    shutil.move(kept, good)
    file = bad / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    elif harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert str(bad) in said[0]


def test_optimizer_state_comes_back(tmp_path: Path) -> None:
    def make() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        parameters = [torch.nn.Parameter(torch.full((3,), float(value))) for value in (1, 2)]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        for value in parameters:
            value.grad = value.detach() ** 2
        optimizer.step()

    old, old_optimizer = make()
    step(old, old_optimizer)
    new, new_optimizer = make()
    names = ["a.weight", "a.weight_2"]  # one name begins like the other
    restore_parameters(dict(zip(names, new, strict=True)), dict(zip(names, old, strict=True)))
    tensors = {name: value.clone() for name, value in optimizer_tensors(old_optimizer, names).items()}
    restore_optimizer(new_optimizer, names, tensors)
    for parameters, optimizer in ((old, old_optimizer), (new, new_optimizer)):
        step(parameters, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_missing_optimizer_state_is_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(RunError, match=r"no optimizer state for \['w'\]"):
        restore_optimizer(optimizer, ["w"], {})


def test_metrics_are_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    assert lines_before(path, 2) == ['{"step": 0}', '{"step": 1}']
    assert lines_before(path, 9) == ['{"step": 0}', '{"step": 1}', '{"step": 2}']
    assert lines_before(tmp_path / "absent.jsonl", 1) == []


_FULL_DISK = """
import sys, torch
from pathlib import Path
from morebench.errors import DiskFullError
from morebench.training.resume import newest_checkpoint, save_checkpoint
root = Path(sys.argv[1])
small, large = ({"parameters": {"a": torch.randn(size)}} for size in (1000, 40000))
save_checkpoint(root, 1, small, {})
try:
    save_checkpoint(root, 2, large, {})
except DiskFullError as error:
    assert "No space left" in str(error), error
    assert [path.name for path in root.iterdir()] == ["step_00000001"]
    assert newest_checkpoint(root, print).step == 1
    sys.exit(error.exit_code)
"""


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    script = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run([*unshare, script, sys.executable, _FULL_DISK], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr


def test_full_disk_named_in_metrics(tmp_path: Path) -> None:
    """/dev/full stands for a file on a disk that has just filled up."""
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as file:
        whole = os.dup(file._file.fileno())
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file._file.fileno())
        with pytest.raises(DiskFullError, match=r"No space left while writing .*metrics.jsonl"):
            file.append({"step": 0})
        os.dup2(whole, file._file.fileno())  # closing writes what is left
    os.close(whole)
    os.close(full)


def _interrupt_after(done: int, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = MetricsFile.append

    def asking_append(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == done - 2 or done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", asking_append)
        with pytest.raises(Interrupted):
            train(config, Step.pretrain, folder, {})
