import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from morebench.errors import DiskFullError, NonFiniteError, RunError
from morebench.training.fragments import Fragment, read_whole, whole
from morebench.training.resume import (
    meta_digest,
    newest_checkpoint,
    restore_optimizer,
    restore_parameters,
)
from morebench.training.saving import Pace
from morebench.training.telemetry import MetricsFile
from morebench.training.writing import aside_of, commit, copied, save_checkpoint, write_pieces

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


def test_the_newest_checkpoint_is_kept_and_the_one_before(tmp_path: Path) -> None:
    for step in (1, 40, 2, 30):  # the second was passed over as damaged: the run went on from the first
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000030"]


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


def write_ranks(root: Path, ranks: list[dict[str, Fragment]]) -> Path:
    """What each rank has of the parameters."""
    aside = aside_of(root, 7, "token")
    for rank, named in enumerate(ranks):
        write_pieces(aside, rank, copied({"parameters": named}, {}), lambda: None)
    return commit(root, aside, len(ranks), {})


def piece(values: torch.Tensor, start: int, *shape: int) -> Fragment:
    return Fragment(values, start, shape)


def test_pieces_of_several_ranks_are_read_as_one(tmp_path: Path) -> None:
    """Cut anywhere, not in the order of the ranks; a rank may have nothing."""
    a, step = torch.arange(15.0), torch.tensor([3.0])
    write_ranks(
        tmp_path,
        [
            {"a": piece(a[9:], 9, 5, 3), "step": piece(step, 0)},
            {"a": piece(a[:2], 0, 5, 3)},
            {"a": piece(a[2:9], 2, 5, 3)},
            {"a": piece(a[:0], 15, 5, 3)},
        ],
    )
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    pieces = found.pieces("parameters")
    assert pieces.shapes == {"a": (5, 3), "step": ()}
    assert torch.equal(read_whole(pieces, "a"), a.view(5, 3))
    assert torch.equal(read_whole(pieces, "step"), torch.tensor(3.0))
    for start in range(16):
        for stop in range(start, 16):
            assert torch.equal(pieces.read("a", start, stop), a[start:stop])
    with pytest.raises(RunError, match=r"Elements 3 to 16 of a were asked for, which has 15"):
        pieces.read("a", 3, 16)


def test_pieces_that_do_not_add_up_make_no_checkpoint(tmp_path: Path) -> None:
    """All of them named, and the one before stays."""
    save_checkpoint(tmp_path, 1, TENSORS, {})
    a = torch.arange(6.0)
    with pytest.raises(RunError) as caught:
        write_ranks(
            tmp_path,
            [
                {"gap": piece(a[:2], 0, 6), "twice": piece(a[:4], 0, 6), "end": piece(a[:3], 0, 6)},
                {"gap": piece(a[3:], 3, 6), "twice": piece(a[3:], 3, 6), "end": piece(a[3:5], 3, 6)},
                {"shapes": piece(a, 0, 6)},
                {"shapes": piece(a[:0], 6, 2, 3)},
            ],
        )
    assert str(caught.value).splitlines()[1:] == [
        "parameters shapes: shape [6] on one rank, [2, 3] on rank 3.",
        "parameters gap: no rank has elements 2 to 3.",
        "parameters twice: several ranks have elements 3 to 4.",
        "parameters end: the pieces hold 5 elements, its shape [6] has 6.",
    ]
    assert [folder.step for folder in [newest_checkpoint(tmp_path, print)] if folder] == [1]


def test_a_copy_uses_the_memory_of_the_one_before_where_it_fits() -> None:
    live = torch.arange(4.0)
    first = copied({"parameters": {"a": whole(live), "b": whole(live)}}, {})
    where = first["parameters"]["a"].values.data_ptr()
    live += 1
    second = copied({"parameters": {"a": whole(live), "b": whole(torch.zeros(2))}}, first)
    live += 1
    assert second["parameters"]["a"].values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert second["parameters"]["a"].values.data_ptr() == where
    assert second["parameters"]["b"].values.tolist() == [0.0, 0.0]


def test_a_rank_whose_files_are_elsewhere_is_named(tmp_path: Path) -> None:
    aside = aside_of(tmp_path, 7, "token")
    write_pieces(aside, 0, TENSORS, lambda: None)
    with pytest.raises(RunError, match=r"Ranks \[1, 2\] wrote a checkpoint, and .* does not hold it"):
        commit(tmp_path, aside, 3, {})


def test_no_checkpoint_is_made_of_nan(tmp_path: Path) -> None:
    bad = {"parameters": {"w": whole(torch.tensor([1.0, float("inf")]))}}
    with pytest.raises(
        NonFiniteError, match=r"After optimizer step 8 NaN or inf is in the parameters of \['w'\]"
    ):
        save_checkpoint(tmp_path, 9, bad, {})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_an_older_format_is_passed_over_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 2, TENSORS, {})
    meta = json.loads((folder / "meta.json").read_text())
    del meta["format"], meta["sha256"]
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": meta_digest(meta)}))
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    assert "format 1, this version of morebench reads 2" in said[0]


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    """Beside its files, in place of one, and in place of one with all hashes made to fit."""
    trace = tmp_path / "was_here"
    evil = pickle.dumps(Evil(trace))
    root = tmp_path / "checkpoints"
    folder = save_checkpoint(root, 2, TENSORS, {})
    for name in ("optimizer.pt", "meta.pkl", ".metadata"):
        (folder / name).write_bytes(evil)
    found = newest_checkpoint(root, print)
    assert found is not None
    read_whole(found.pieces("parameters"), "a")
    target = folder / "parameters.rank0000.safetensors"
    target.write_bytes(evil)
    assert newest_checkpoint(root, print) is None
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["files"][target.name] = hashlib.sha256(evil).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": meta_digest(meta)}))
    found = newest_checkpoint(root, print)
    assert found is not None
    with pytest.raises(SafetensorError):
        read_whole(found.pieces("parameters"), "a")
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists(), "the file would have done harm"


def test_a_checkpoint_is_due_by_steps_or_by_minutes() -> None:
    now = [1000.0]
    pace = Pace(every_n_steps=100, every_n_minutes=10, clock=lambda: now[0])
    assert not pace.is_due(99)
    assert pace.is_due(100)
    assert pace.is_due(101), "still owed while another one was being written"
    pace.taken()
    now[0] += 599
    assert not pace.is_due(102)
    now[0] += 1
    assert pace.is_due(103)
    pace.taken()
    assert not pace.is_due(104)


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
