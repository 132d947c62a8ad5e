import os
from dataclasses import replace
from pathlib import Path

import pytest

from morebench.config.compose import compose_config
from morebench.config.schema import Config, Part, Paths, Weights
from morebench.errors import WeightsError
from morebench.models.weights import built_folder, folder_hash, locate, starting_weights


def cell(tmp_path: Path, *overrides: str) -> Config:
    config = compose_config(list(overrides)).config
    places = {"weights": str(tmp_path / "weights"), "cache": str(tmp_path / "cache")}
    return replace(config, paths=replace(config.paths, **places))


def hub(hub_id: str, revision: str | None = None) -> Weights:
    return Weights(folder=None, hub_id=hub_id, revision=revision, build=None)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return cell(tmp_path).paths


def test_a_local_copy_comes_before_the_cache(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/models--google--gemma/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub/models--google--gemma/refs").mkdir()
    (tmp_path / "hub/models--google--gemma/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate(hub("google/gemma"), paths) == snapshot
    assert locate(hub("google/gemma", "main"), paths) == snapshot
    assert locate(hub("google/gemma", "v2"), paths) is None
    local = Path(paths.weights) / "google/gemma"
    local.mkdir(parents=True)
    assert locate(hub("google/gemma"), paths) == local


def test_built_parts_lie_where_their_recipe_says(paths: Paths) -> None:
    recipe = {"_target_": "morebench.digits.tiny_llm.build", "family": "gemma2", "seed": 0}
    weights = Weights(folder=None, hub_id=None, revision=None, build=recipe)
    folder = built_folder(weights, paths)
    assert folder.parent == Path(paths.cache) / "parts"
    assert folder.name.startswith("tiny_llm-")
    assert folder == built_folder(replace(weights, build=dict(reversed(recipe.items()))), paths)
    assert folder != built_folder(replace(weights, build=recipe | {"seed": 1}), paths)
    assert locate(weights, paths) is None
    folder.mkdir(parents=True)
    assert locate(weights, paths) == folder


def test_all_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = cell(tmp_path, "llm=gemma2_9b", "vision=clip_tiny")
    with pytest.raises(WeightsError) as caught:
        starting_weights(config)
    first, second = str(caught.value).splitlines()
    assert "hf download google/gemma-2-9b-it" in first
    assert "not built yet" in second
    folder = built_folder(config.vision.weights, config.paths)
    folder.mkdir(parents=True)
    (tmp_path / "weights/google/gemma-2-9b-it").mkdir(parents=True)
    assert starting_weights(config) == {
        Part.llm: tmp_path / "weights/google/gemma-2-9b-it",
        Part.vision: folder,
    }


def test_the_hash_is_of_names_and_contents_only(tmp_path: Path) -> None:
    folder, copy = tmp_path / "one", tmp_path / "two"
    for place in (folder, copy):
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"weights")
        (place / "config.json").write_text("{}")
    (folder / "README.md").write_text("not hashed")
    before = folder_hash(folder, tmp_path / "cache")
    assert before == folder_hash(copy, tmp_path / "other_cache")
    (folder / "config.json").write_text("{ }")
    assert folder_hash(folder, tmp_path / "cache") != before
    (copy / "config.json").rename(copy / "configuration.json")
    assert folder_hash(copy, tmp_path / "other_cache") != before


def test_contents_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    stat = weights.stat()
    before = folder_hash(folder, tmp_path / "cache")
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder_hash(folder, tmp_path / "cache") == before, "size and mtime are unchanged: not read again"
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert folder_hash(folder, tmp_path / "cache") != before


def test_an_empty_folder_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        folder_hash(tmp_path, tmp_path / "cache")
