"""State of a run on disk: DONE, LOCK and ATTEMPTS.

No file times and no flock: both lie on shared file systems.
"""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from morebench.errors import EXIT_INTERRUPTED, FencedError, RunError

DONE, LOCK, ATTEMPTS = "DONE", "LOCK", "ATTEMPTS.jsonl"


class HeldError(RunError):
    """Another process runs it."""


class State(Enum):
    missing = "missing"
    running = "running"
    interrupted = "interrupted"  # stopped with its state saved, or killed: the next start continues
    failed = "failed"
    done = "done"


@dataclass(frozen=True)
class Owner:
    """Who holds a LOCK; `started` tells a living process from a later one with the same pid.

    `job` and `restarts` are SLURM's: a requeued job keeps its number and counts its starts.
    """

    host: str
    pid: int
    started: str
    token: str
    job: str | None = None
    restarts: int = 0

    @classmethod
    def this_process(cls) -> "Owner":
        """A new holder: the token is drawn."""
        number, cluster = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME", "")
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_time(os.getpid()),
            secrets.token_hex(8),
            f"{cluster}:{number}" if number else None,
            int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def succeeds(self, holder: "Owner") -> bool:
        """A later start of the same job: SLURM started it only because it has given the earlier one up, as
        when a node was lost. That one may live on unseen; the fence keeps it from writing.
        """
        return self.job is not None and self.job == holder.job and self.restarts > holder.restarts

    def is_alive(self) -> bool:
        """Another host's process cannot be asked and counts as alive."""
        return self.host != socket.gethostname() or _start_time(self.pid) == self.started


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # no /proc (macOS): a living pid is all that can be known
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    return "alive"


def write_json(path: Path, content: Any) -> None:
    """All or nothing: written aside, flushed to the disk, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}). Delete the file to let the run start again.") from error


def attempts(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / ATTEMPTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def owner(folder: Path) -> Owner | None:
    found = read_json(folder / LOCK)
    return Owner(**found) if found else None


def is_done(folder: Path) -> bool:
    """DONE exists and every artefact it names is there with its size."""
    done = read_json(folder / DONE)
    if done is None:
        return False
    sizes = {name: entry["size"] for name, entry in done["files"].items()}
    return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in sizes.items())


def state(folder: Path) -> State:
    if is_done(folder):
        return State.done
    holder = owner(folder)
    if holder is not None and holder.is_alive():
        return State.running
    past = attempts(folder)
    if not past:
        return State.interrupted if holder is not None else State.missing
    code = past[-1].get("exit_code")  # absent: killed before it could write
    return State.interrupted if code in (None, EXIT_INTERRUPTED) else State.failed


def last_message(folder: Path) -> str:
    past = attempts(folder)
    return str(past[-1].get("message", "killed")) if past else ""


@contextmanager
def locked(folder: Path) -> Iterator[Owner]:
    """Hold the run. Raises HeldError when a living process has it."""
    me = Owner.this_process()
    _acquire(folder, me)
    try:
        yield me
    finally:
        if owner(folder) == me:
            (folder / LOCK).unlink()


def check_owner(folder: Path, me: Owner) -> None:
    """The fence: raises FencedError once the lock is no longer `me`'s."""
    holder = owner(folder)
    if holder == me:
        return
    now = f"process {holder.pid} on {holder.host}" if holder is not None else "nobody"
    raise FencedError(
        f"{folder.name} was taken from this process ({me.pid} on {me.host}) while it ran: {folder / LOCK} "
        f"is now held by {now}. This older copy ends here and writes nothing more."
    )


def _acquire(folder: Path, me: Owner) -> None:
    lock, mine = folder / LOCK, folder / f".{LOCK}.{me.token}"
    mine.write_text(json.dumps(asdict(me)))
    try:
        for _ in range(2):
            try:
                os.link(mine, lock)  # atomic on network file systems too, and never seen half-written
                return
            except FileExistsError:
                holder = owner(folder)
                if holder is not None and holder.is_alive() and not me.succeeds(holder):
                    raise HeldError(
                        f"{folder.name} is being run by process {holder.pid} on {holder.host}. "
                        f"Wait for it, or delete {lock} if that process is certainly gone."
                    ) from None
                if holder is not None:
                    _remove_stale(lock, holder, me)
        raise HeldError(f"{folder.name}: another process took {lock} at the same moment. Start again.")
    finally:
        mine.unlink(missing_ok=True)


def _remove_stale(lock: Path, holder: Owner, me: Owner) -> None:
    """Move the stale lock away; if somebody renewed it in between, put theirs back."""
    aside = lock.with_name(f".{LOCK}.stale.{me.token}")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    if json.loads(aside.read_text())["token"] != holder.token:
        os.link(aside, lock)
    aside.unlink()


def begin_attempt(folder: Path, me: Owner) -> int:
    number = sum("begun" in line for line in attempts(folder)) + 1
    _append(folder, {"attempt": number, "host": me.host, "pid": me.pid, "begun": True})
    return number


def end_attempt(folder: Path, number: int, exit_code: int, message: str) -> None:
    _append(folder, {"attempt": number, "exit_code": exit_code, "message": message})


def _append(folder: Path, line: dict[str, Any]) -> None:
    with (folder / ATTEMPTS).open("a") as file:
        file.write("\n" + json.dumps(line) + "\n")  # ends a line that a killed process tore
        file.flush()
        os.fsync(file.fileno())


def mark_done(folder: Path, artefacts: list[Path], fence: Callable[[], None] = lambda: None) -> None:
    """Write DONE, the last file of a run, with size and sha256 of every artefact, if `fence` allows it."""
    files = {}
    for path in sorted(artefacts):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256}
    fence()  # hashing took its time
    write_json(folder / DONE, {"files": files})
