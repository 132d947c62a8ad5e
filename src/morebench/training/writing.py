"""Writing a checkpoint: aside, to the disk, read back, and renamed only then; beside the training.

Every rank writes its own files into one folder under another name, and then a list of them. When all have,
the first rank makes `meta.json` of the lists and gives the folder its name. Ranks on several machines share
the file system.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from morebench.errors import NonFiniteError, RunError
from morebench.training.fence import Fence, unfenced
from morebench.training.files import disk_full_named, remove_folder, replace, sha256, sync, write_atomically
from morebench.training.fragments import Fragment
from morebench.training.resume import (
    FORMAT,
    META,
    PREFIX,
    checkpoint_folders,
    file_name,
    layouts_of,
    meta_digest,
)

Tensors = Mapping[str, Mapping[str, Fragment]]  # kind -> name -> this rank's piece
_CHUNK = 2**24  # elements looked at at once: what is compared is not copied in full


Copied = dict[str, dict[str, Fragment]]


def copied(tensors: Tensors, into: Copied) -> Copied:
    """On the CPU, where training does not change it. `into` is an earlier copy, whose memory is used again:
    to ask for new memory takes several times as long as to fill it.
    """

    def copy(kind: str, name: str, piece: Fragment) -> Fragment:
        values, former = piece.values.detach(), into.get(kind, {}).get(name)
        if former is None or (former.values.shape, former.values.dtype) != (values.shape, values.dtype):
            return piece._replace(values=values.to("cpu", copy=True).contiguous())
        return piece._replace(values=former.values.copy_(values))

    return {
        kind: {name: copy(kind, name, piece) for name, piece in named.items()}
        for kind, named in tensors.items()
    }


def write_pieces(aside: Path, rank: int, tensors: Tensors, progressed: Callable[[], None]) -> None:
    """A rank's files in `aside`, which the other ranks use too. Raises DiskFullError, NonFiniteError, and
    RunError when what is read back is not what was written.
    """
    with disk_full_named(aside):
        aside.mkdir(parents=True, exist_ok=True)
        hashes, pieces = {}, {}
        for kind, named in tensors.items():
            if not named:  # of replicas, the first rank has all
                continue
            path = aside / file_name(kind, rank)
            values = {name: piece.values for name, piece in named.items()}
            if bad := [name for name, value in values.items() if not _is_finite(value)]:
                raise NonFiniteError(
                    f"After optimizer step {_step_of(aside) - 1} NaN or inf is in the {kind} of {bad[:5]}"
                    f"{', ...' if len(bad) > 5 else ''}. No checkpoint was made of it. Lower optimizer.lr."
                )
            save_file(values, path)
            progressed()
            sync(path)
            progressed()
            hashes[path.name] = sha256(path)
            progressed()
            _verify(path, values)
            progressed()
            pieces[kind] = {
                name: {"shape": piece.shape, "start": piece.start, "length": piece.values.numel()}
                for name, piece in named.items()
            }
        write_atomically(_list_of(aside, rank), json.dumps({"files": hashes, "pieces": pieces}))


def commit(
    root: Path, aside: Path, world_size: int, facts: Mapping[str, Any], fence: Fence = unfenced
) -> Path:
    """Give what all ranks wrote into `aside` its name, and remove the older checkpoints.

    Raises DiskFullError (what was there stays), RunError when the pieces do not add up, and what `fence`
    does.
    """
    step = _step_of(aside)
    target = root / f"{PREFIX}{step:08d}"
    lists = [_list_of(aside, rank) for rank in range(world_size)]
    if missing := [rank for rank, path in enumerate(lists) if not path.is_file()]:
        raise RunError(
            f"Ranks {missing} wrote a checkpoint, and {aside} does not hold it. All nodes of a run must see "
            "the same files below paths.runs."
        )
    written = [json.loads(path.read_text()) for path in lists]
    layouts = layouts_of(one["pieces"] for one in written)
    meta = {
        "format": FORMAT,
        "step": step,
        "files": {name: digest for one in written for name, digest in one["files"].items()},
        "layouts": layouts,
        "facts": dict(facts),
    }
    meta = json.loads(json.dumps(meta))  # named tuples become lists: what is hashed is what will be read
    with disk_full_named(target):
        (aside / META).write_text(json.dumps({**meta, "sha256": meta_digest(meta)}))
        sync(aside / META)
        for path in lists:
            path.unlink()
        sync(aside)
        fence()
        remove_folder(target)  # a corrupt one of the same step
        replace(aside, target)
    others = sorted(path for path in checkpoint_folders(root) if path != target)
    before = [path for path in others if path.name < target.name][-1:]  # should this one rot on the disk
    for other in others:
        if other not in before:
            remove_folder(other)
    return target


def save_checkpoint(root: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> Path:
    """All of it at once, by a single rank; waits until it is on the disk."""
    remove_leftovers(root)
    aside = aside_of(root, step, secrets.token_hex(4))
    try:
        write_pieces(aside, 0, tensors, lambda: None)
        return commit(root, aside, 1, facts)
    finally:
        remove_folder(aside)


def aside_of(root: Path, step: int, token: str) -> Path:
    """`token` is of one start of a run, so that an older copy that lived on writes elsewhere."""
    return root / f".{PREFIX}{step:08d}.tmp-{token}"


def remove_leftovers(root: Path) -> None:
    """Of killed starts; large enough to fill a disk."""
    for leftover in root.glob(f".{PREFIX}*"):
        remove_folder(leftover)


class Writer:
    """One checkpoint at a time, by a thread: first this rank's files, then on the first rank the commit."""

    def __init__(self, root: Path, token: str, rank: int, world_size: int, fence: Fence) -> None:
        self._root, self._token, self._rank, self._world_size = root, token, rank, world_size
        self._fence = fence
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[Any] | None = None
        self._closing = False
        self._facts: dict[str, Any] = {}
        self._held: Copied = {}  # the only copy there is, kept from one checkpoint to the next
        self.aside: Path | None = None  # of the checkpoint that is being written
        self.progress = 0  # grows while something happens

    def write(
        self, step: int, tensors: Tensors, facts: dict[str, Any], before: Callable[[], None] | None
    ) -> None:
        """Returns once the tensors are copied. `before` is called first, by the thread."""
        assert self._job is None
        self._facts = facts
        self.aside = aside = aside_of(self._root, step, self._token)
        self._held = held = copied(tensors, self._held)

        def job() -> None:
            if before is not None:
                before()
            write_pieces(aside, self._rank, held, self._progressed)

        self._job = self._pool.submit(job)

    @property
    def is_busy(self) -> bool:
        return self._job is not None and not self._job.done()

    @property
    def is_pending(self) -> bool:
        """Something is not committed yet."""
        return self._job is not None

    @property
    def error(self) -> BaseException | None:
        return self._job.exception() if self._job is not None and self._job.done() else None

    def wait(self, seconds: float) -> None:
        if self._job is not None:
            with suppress(TimeoutError):
                self._job.exception(seconds)

    def advance(self) -> None:
        """Called on all ranks once none is busy: written becomes committed, and committed is the end."""
        if self._job is None:
            return
        aside, self.aside = self.aside, None
        self._job = None
        if aside is not None and self._rank == 0:
            self._job = self._pool.submit(
                commit, self._root, aside, self._world_size, self._facts, self._fence
            )

    def close(self) -> None:
        """What is not committed yet is given up."""
        self._closing = True
        self._pool.shutdown(wait=True)
        if self._rank == 0:
            for aside in self._root.glob(f".{PREFIX}*.tmp-{self._token}"):
                remove_folder(aside)

    def _progressed(self) -> None:
        self.progress += 1
        if self._closing:
            raise RunError("The checkpoint is not wanted any more.")


def _list_of(aside: Path, rank: int) -> Path:
    return aside / f"rank{rank:04d}.json"


def _step_of(aside: Path) -> int:
    return int(aside.name.removeprefix(f".{PREFIX}").partition(".")[0])


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or all(
        bool(torch.isfinite(chunk).all()) for chunk in values.split(_CHUNK)
    )


def _verify(path: Path, values: Mapping[str, Tensor]) -> None:
    """What the file system gives back is, bit by bit, what is in memory."""
    with safe_open(path, framework="pt") as file:
        for name, value in values.items():
            if not torch.equal(file.get_tensor(name).view(torch.uint8), value.view(torch.uint8)):
                raise RunError(
                    f"{path}: {name} reads back different from what was written. Is the disk sound?"
                )
