"""Where the rows of a hub data set are: in a local mirror, in the Hugging Face cache, or on the hub."""

import errno
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from glob import glob
from pathlib import Path

from morebench.config.schema import Paths, TaskData
from morebench.data.hashes import file_hashes
from morebench.errors import ConfigError, DataError, MorebenchError, join_problems
from morebench.evaluation.layout import DEFAULT, README, Layout, layout_of
from morebench.evaluation.saved import saved_files
from morebench.models.weights import is_lfs_pointer

_COMMIT = re.compile("[0-9a-f]{40}")


class Origin(Enum):
    mirror = "a local mirror"
    cache = "the Hugging Face cache"


@dataclass(frozen=True)
class Place:
    origin: Origin
    hub_id: str
    folder: Path
    commit: str | None  # of the hub's repository, where known
    rows: Sequence[str]  # names below `folder` that hold the config's split, in the order of the rows
    images: Sequence[str]  # those of image_config

    def content_hash(self, cache: Path) -> str:
        """Of the contents and their order: neither names nor places count."""
        hashes = file_hashes(self.folder, [*self.rows, *self.images], cache)
        lists = "\n\n".join("\n".join(hashes[name] for name in part) for part in (self.rows, self.images))
        return hashlib.sha256(lists.encode()).hexdigest()


def find_place(data: TaskData, paths: Paths) -> Place | None:
    """Never asks the hub. A mirror that is there must hold the split: raises DataError otherwise."""
    ids = hub_ids(data)
    for hub_id, folder in zip(ids, mirror_folders(data, paths), strict=True):
        if folder.is_dir() and any(folder.iterdir()):
            return _checked(data, _mirrored(data, hub_id, folder))
    for hub_id in ids:
        if (place := _cached(data, hub_id)) is not None:
            return _checked(data, place)
    return None


def hub_ids(data: TaskData) -> list[str]:
    if data.hub_id is None or data.split is None:
        raise ConfigError(f"data.folder={data.folder}: expected data.records, or data.hub_id and data.split.")
    return [data.hub_id, *([data.also_at] if data.also_at else [])]


def mirror_folders(data: TaskData, paths: Paths) -> list[Path]:
    """One per hub id."""
    return [Path(paths.data) / folder for folder in (data.folder, *([data.also_at] if data.also_at else []))]


def absence(data: TaskData, paths: Paths) -> str:
    """What to tell a user whose machine lacks the data set."""
    folders = mirror_folders(data, paths)
    places, command = " or ".join(map(str, folders)), _fetching(data, hub_ids(data)[0], folders[0])
    return (
        f"{data.hub_id} ({data.config or DEFAULT}, {data.split}) is neither in {places} nor in the "
        f"Hugging Face cache. Set download=true, or run: {command}"
    )


def _fetching(data: TaskData, hub_id: str, folder: Path) -> str:
    """The command that fills a mirror; the patterns are what a repository without a README would have."""
    configs = [data.config, *([data.image_config] if data.image_config else [])]
    patterns = [f"{'data' if c in (None, DEFAULT) else c}/{data.split}-*" for c in configs]
    command = ["hf", "download", hub_id, "--repo-type", "dataset"]
    command += ["--revision", data.revision] if data.revision else []
    command += [word for pattern in (README, *patterns) for word in ("--include", pattern)]
    return shlex.join([*command, "--local-dir", str(folder)])


def download(data: TaskData) -> None:
    """Into the Hugging Face cache; goes on where it was cut off.

    Raises DataError if neither copy can be had, MorebenchError if the hub cannot be reached, OSError for a
    full disk.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    reasons = []
    for hub_id in hub_ids(data):
        try:
            return _download(data, hub_id)
        except (RepositoryNotFoundError, RevisionNotFoundError, DataError) as error:
            reasons.append(f"{hub_id}: {_reason(error, hub_id)}")
        except Exception as error:  # the HTTP library, and so its errors, is not the same in every version
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise MorebenchError(
                f"{hub_id} could not be fetched: {type(error).__name__}: {error}. The same command goes on."
            ) from error
    raise DataError("cannot be downloaded:\n" + join_problems(reasons))


def _download(data: TaskData, hub_id: str) -> None:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    names = HfApi().list_repo_files(hub_id, repo_type="dataset", revision=data.revision)
    readme = None
    if README in names:
        path = hf_hub_download(hub_id, README, repo_type="dataset", revision=data.revision)
        readme = Path(path).read_text()
    rows, images = _both(data, layout_of(names, readme))
    snapshot_download(
        hub_id, repo_type="dataset", revision=data.revision, allow_patterns=[README, *rows, *images]
    )


def _reason(error: Exception, hub_id: str) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"gated: accept its terms at https://huggingface.co/datasets/{hub_id}, then run: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such data set, or it is private; if you may read it, run: hf auth login"
    return str(error).strip().split("\n")[0]


def _mirrored(data: TaskData, hub_id: str, folder: Path) -> Place:
    assert data.split is not None
    try:
        rows = saved_files(folder, data.config, data.split)
        if rows is not None:
            images = (saved_files(folder, data.image_config, data.split) if data.image_config else None) or []
        else:
            rows, images = _both(data, _layout(folder))
    except DataError as error:
        reason = f"{folder}: {error}.{_told_scripts(folder)}"
        raise DataError(f"{reason} To complete it: {_fetching(data, hub_id, folder)}") from error
    return Place(Origin.mirror, hub_id, folder, _known_commit(folder, [*rows, *images]), rows, images)


def _cached(data: TaskData, hub_id: str) -> Place | None:
    """None also if a part of what is needed was never fetched, or not all of it."""
    from huggingface_hub import constants

    storage = Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"
    revision = data.revision or constants.DEFAULT_REVISION
    reference = storage / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = storage / "snapshots" / commit
    if not folder.is_dir():
        return None
    try:
        rows, images = _both(data, _layout(folder))
    except DataError:
        return None
    return Place(Origin.cache, hub_id, folder, commit, rows, images)


def _both(data: TaskData, layout: Layout) -> tuple[Sequence[str], Sequence[str]]:
    assert data.split is not None
    images = layout.files(data.image_config, data.split) if data.image_config else []
    return layout.files(data.config, data.split), images


def _layout(folder: Path) -> Layout:
    names = glob("**/*.parquet", root_dir=folder, recursive=True)  # follows links to folders
    names = [Path(name).as_posix() for name in names if (folder / name).is_file()]
    readme = folder / README
    return layout_of(names, readme.read_text(errors="replace") if readme.is_file() else None)


def _told_scripts(folder: Path) -> str:
    scripts = sorted(path.name for path in folder.glob("*.py"))
    return f" {', '.join(scripts)} is not run: data sets are read, never executed." if scripts else ""


def _known_commit(folder: Path, names: Sequence[str]) -> str | None:
    """What `hf download --local-dir` noted about every file; None unless they are of one commit."""
    notes = [folder / ".cache" / "huggingface" / "download" / f"{name}.metadata" for name in names]
    if not all(note.is_file() for note in notes):
        return None
    commits = {note.read_text(errors="replace").split("\n")[0].strip() for note in notes}
    return commits.pop() if len(commits) == 1 else None


def _checked(data: TaskData, place: Place) -> Place:
    """Whether it is the pinned commit, and all of its files are more than pointers."""
    paths = [place.folder / name for name in (*place.rows, *place.images)]
    problems = [f"{path} is empty." for path in paths if path.stat().st_size == 0]
    if pointers := [path for path in paths if is_lfs_pointer(path)]:
        problems += [
            f"{path} is a git-LFS pointer, not the file. Run there: git lfs pull" for path in pointers
        ]
    pinned = data.revision if data.revision and _COMMIT.fullmatch(data.revision) else None
    if pinned and place.commit and place.commit != pinned:
        problems.append(
            f"{place.folder} is of commit {place.commit}, expected data.revision={pinned}. Fetch that one: "
            f"hf download {place.hub_id} --repo-type dataset --revision {pinned} --local-dir {place.folder}"
        )
    if problems:
        raise DataError(join_problems(problems))
    return place
