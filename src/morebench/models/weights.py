"""Where starting weights lie on this machine, and what they hash to. No torch: planning needs both."""

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from morebench.config.schema import Config, Part, Paths, Weights
from morebench.data.hashes import file_hashes
from morebench.errors import WeightsError, join_problems

_HASHED = (".safetensors", ".json")


def locate(weights: Weights, paths: Paths) -> Path | None:
    """The local folder of these weights, or None if they are not on this machine. Never downloads.

    Hub weights: `<paths.weights>/<hub_id>`, else the Hugging Face cache.
    """
    if weights.folder is not None:
        given = Path(weights.folder)
        return given if given.is_dir() else None
    if weights.build is not None:
        folder = built_folder(weights, paths)
        return folder if folder.is_dir() else None
    if weights.hub_id is None:
        return None
    folder = Path(paths.weights) / weights.hub_id
    return folder if folder.is_dir() else _cached_snapshot(weights.hub_id, weights.revision)


def built_folder(weights: Weights, paths: Paths) -> Path:
    """Where the recipe `weights.build` puts its part; another recipe, or other code, gets another folder."""
    assert weights.build is not None
    package, name, _ = weights.build["_target_"].rsplit(".", 2)
    recipe = json.dumps([weights.build, _source_hash(package)], sort_keys=True)
    return Path(paths.cache) / "parts" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


@cache
def _source_hash(package: str) -> str:
    """sha256 over a package's own *.py files, which are read and not run."""
    spec = find_spec(package)
    assert spec is not None, package
    files = sorted(
        path for place in spec.submodule_search_locations or [] for path in Path(place).glob("*.py")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """A clone without git-LFS leaves a few lines of text where the weights should be."""
    if path.stat().st_size > 1024:
        return False
    return path.read_bytes().startswith(b"version https://git-lfs")


def starting_weights(config: Config) -> dict[Part, Path]:
    """The folders of the LLM's and the vision encoder's weights. Raises one WeightsError for all missing."""
    found, problems = {}, []
    for part, weights in ((Part.llm, config.llm.weights), (Part.vision, config.vision.weights)):
        folder = locate(weights, config.paths)
        if folder is not None:
            found[part] = folder
        else:
            problems.append(f"{part.name}: {absence(weights, config.paths)}")
    if problems:
        raise WeightsError(join_problems(problems))
    return found


def absence(weights: Weights, paths: Paths) -> str:
    """What to tell a user whose machine lacks these weights."""
    if weights.folder is not None:
        return f"weights.folder={weights.folder} is not a folder on this machine."
    if weights.build is not None:
        return f"{built_folder(weights, paths)} is not built yet."
    local = Path(paths.weights) / str(weights.hub_id)
    return (
        f"{weights.hub_id} is neither in {local} nor in the Hugging Face cache. "
        f"Run: hf download {weights.hub_id} --revision {weights.revision or 'main'}"
    )


def folder_hash(folder: Path, cache: Path) -> str:
    """sha256 over the names and contents of the folder's *.safetensors and *.json.

    Contents are read once: a file of unchanged size and mtime keeps the hash remembered below `cache`.
    """
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _HASHED and path.is_file()
    ]
    if not names:
        raise WeightsError(f"{folder} has neither *.safetensors nor *.json: these are no weights.")
    hashes = file_hashes(folder, names, cache)
    return hashlib.sha256(
        "\n".join(f"{name} {digest}" for name, digest in hashes.items()).encode()
    ).hexdigest()


def _cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "open_clip_config.json"):
        path = try_to_load_from_cache(hub_id, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None
