import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from morebench.errors import DiskFullError, RunError
from morebench.training.fragments import read_whole, whole
from morebench.training.resume import (
    newest_checkpoint,
    restore_optimizer,
    restore_parameters,
)
from morebench.training.telemetry import MetricsFile
from morebench.training.writing import save_checkpoint

TENSORS = {
    "parameters": {"a": whole(torch.arange(6.0).view(2, 3))},
    "random": {"cpu": whole(torch.zeros(3, dtype=torch.uint8))},
}


def test_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {"seconds": 1.5})
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    assert (found.step, found.facts) == (3, {"seconds": 1.5})
    pieces = found.pieces("parameters")
    assert pieces.shapes == {"a": (2, 3)}
    assert torch.equal(read_whole(pieces, "a"), torch.arange(6.0).view(2, 3))
    assert torch.equal(pieces.read("a", 2, 5), torch.arange(2.0, 5.0))
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


@pytest.mark.parametrize(
    "name", ["parameters.rank0000.safetensors", "random.rank0000.safetensors", "meta.json"]
)
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
    tensors = {
        f"{name}/{key}": value.clone()
        for name, parameter in zip(names, old, strict=True)
        for key, value in old_optimizer.state[parameter].items()
    }
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
    for first_step, steps in ((9, [0, 1, 2]), (2, [0, 1])):
        with MetricsFile(path, first_step):
            assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in steps)
    with MetricsFile(tmp_path / "absent.jsonl", 1) as metrics:
        metrics.append({"step": 1})
    assert (tmp_path / "absent.jsonl").read_text() == '{"step": 1}\n'


_FULL_DISK = """
import sys, torch
from pathlib import Path
from morebench.errors import DiskFullError
from morebench.training.fragments import whole
from morebench.training.resume import newest_checkpoint
from morebench.training.writing import save_checkpoint
root = Path(sys.argv[1])
small, large = ({"parameters": {"a": whole(torch.randn(size))}} for size in (1000, 40000))
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
