"""Records of the ten benchmarks: from every place they may lie in, and every way they may be broken."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features
from factories_records import (
    SIZE,
    TABLES,
    Row,
    image,
    paths_in,
    png,
    suite,
    table_of,
    task,
    write_mirror,
    write_shards,
)
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image

from morebench.config.compose import compose_config
from morebench.config.schema import Paths, Profile
from morebench.errors import DataError, MorebenchError
from morebench.evaluation import hub_records
from morebench.evaluation.image_store import ImageStore
from morebench.evaluation.items import OpenTask
from morebench.evaluation.layout import layout_of
from morebench.evaluation.records import open_task, task_hash
from morebench.matrix.sources import Sources
from morebench.prepare import download_missing

PAPER, NEWER = Profile.paper, Profile.lmms_eval_0_7_3
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """All data sets, below lmms-lab."""
    paths = paths_in(tmp_path_factory.mktemp("mirrors"))
    write_mirror(Path(paths.data) / "lmms-lab")
    return paths


def opened(name: str, paths: Paths, profile: Profile = PAPER, **data: Any) -> OpenTask:
    return open_task(name, task(name, **data), paths, profile)


def pixels(stored: Any) -> list[Any]:
    return np.asarray(stored.load()).tolist()


def expected_pixels(number: int) -> list[Any]:
    return np.asarray(Image.open(io.BytesIO(png(number)))).tolist()


def asked(found: OpenTask) -> list[tuple[Any, ...]]:
    """All that a place may not change."""
    return [(i.index, i.id, i.record, i.question, [image.key for image in i.images]) for i in found.items]


def one_mirror(
    tmp_path: Path, name: str, change: Callable[[list[Row]], Any] | None = None, readme: bool = True
) -> Paths:
    paths = paths_in(tmp_path)
    changes = {key: change for key in TABLES if key[0] == name} if change else None
    write_mirror(Path(paths.data) / "lmms-lab", name, readme, changes)
    return paths


def refusal(name: str, paths: Paths, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(name, paths, **data)
    return str(caught.value)


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("name", list(suite().tasks))
def test_every_task_opens_with_one_image_per_image_token(mirrors: Paths, name: str, profile: Profile) -> None:
    found = opened(name, mirrors, profile)
    assert len(found.items) == SIZE
    for item in found.items:
        assert len(item.images) == item.question.text.count(
            "<image>" if "<image>" in item.question.text else "<image "
        )
        assert all(stored.load().size == (7, 5) for stored in item.images)
    assert found.source.content_hash == task_hash(task(name).data, mirrors)
    assert len(pickle.dumps(found.items)) < 2500 * SIZE, "images are not kept in memory"


def test_types_are_those_of_the_hub(mirrors: Paths) -> None:
    record = {name: opened(name, mirrors).items[3].record for name in suite().tasks}
    assert record["scienceqa_img"]["answer"] == 1
    assert record["ai2d"]["answer"] == "3"
    assert record["mmmu_val"]["options"] == "['a', 'b']"
    assert record["mmbench_cn_dev"]["hint"] == record["mmbench_cn_dev"]["C"] == "nan"
    assert record["textvqa_val"]["answers"] == ["stop"] * 10
    assert record["textvqa_val"]["ocr_tokens"] == ["STOP"] * 3
    assert record["textvqa_val"]["question_id"] == 34_605


def test_images_of_other_rows_and_tasks_with_the_same_bytes_have_one_key(mirrors: Paths) -> None:
    pope = opened("pope", mirrors)
    ai2d = opened("ai2d", mirrors)
    assert len({item.images[0].key for item in pope.items}) == 1
    assert pope.items[0].images[0].key == ai2d.items[0].images[0].key
    assert len({item.images[0].key for item in ai2d.items}) == SIZE


def test_a_place_names_its_image(mirrors: Paths) -> None:
    video = opened("seedbench", mirrors, NEWER).items[1]
    assert [pixels(frame) for frame in video.images] == [expected_pixels(1 + n) for n in range(8)]
    assert pixels(opened("seedbench", mirrors).items[2].images[0]) == expected_pixels(2), "a list of one"
    two = opened("mmmu_val", mirrors).items[1]
    assert [pixels(stored) for stored in two.images] == [expected_pixels(11), expected_pixels(13)]
    assert two.record["image_2"] is None
    gqa = opened("gqa", mirrors).items  # imageId n0 is the second row of the images
    assert [pixels(item.images[0]) for item in gqa[:2]] == [expected_pixels(101), expected_pixels(100)]


def _saved(name: str, split: str, config: str = "default") -> DatasetDict:
    table = table_of((name, config, split))
    features = Features.from_arrow_schema(table.schema)
    return DatasetDict({split: Dataset(table.replace_schema_metadata(features.arrow_schema.metadata))})


PLACES: dict[str, Callable[[Path, Path], Any]] = {
    "with a README": lambda data, hub: write_mirror(data / "lmms-lab", "SEED-Bench"),
    "without a README": lambda data, hub: write_mirror(data / "lmms-lab", "SEED-Bench", readme=False),
    "the other organisation": lambda data, hub: write_mirror(data / "lmms-lab-encoder", "SEED-Bench"),
    "a saved dict": lambda data, hub: _saved("SEED-Bench", "test").save_to_disk(data / "lmms-lab/SEED-Bench"),
    "a saved set": lambda data, hub: _saved("SEED-Bench", "test")["test"].save_to_disk(
        data / "lmms-lab/SEED-Bench"
    ),
    "the cache": lambda data, hub: cached(hub, "lmms-lab", "SEED-Bench"),
    "the cache, the other organisation": lambda data, hub: cached(hub, "lmms-lab-encoder", "SEED-Bench"),
}


def cached(hub: Path, organisation: str, name: str, commit: str = COMMIT) -> Path:
    """As the hub's library lays it out."""
    storage = hub / f"datasets--{organisation}--{name}"
    write_mirror(storage / "snapshots", name)
    (storage / "snapshots" / name).rename(storage / "snapshots" / commit)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    return storage / "snapshots" / commit


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_questions(
    mirrors: Paths, tmp_path: Path, no_cache: Path, place: str
) -> None:
    paths = paths_in(tmp_path)
    PLACES[place](Path(paths.data), no_cache)
    for profile in Profile:
        found = opened("seedbench", paths, profile)
        assert asked(found) == asked(opened("seedbench", mirrors, profile))
    if "saved" not in place:  # other files
        assert found.source.content_hash == task_hash(task("seedbench").data, mirrors)
    is_cached = "cache" in place
    assert found.source.commit == (COMMIT if is_cached else None)
    assert found.source.origin == ("the Hugging Face cache" if is_cached else "a local mirror")


def test_saved_configs_lie_in_folders_of_their_names(mirrors: Paths, tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    folder = Path(paths.data) / "lmms-lab" / "GQA"
    for config in ("testdev_balanced_instructions", "testdev_balanced_images"):
        _saved("GQA", "testdev", config).save_to_disk(folder / config)
    assert asked(opened("gqa", paths)) == asked(opened("gqa", mirrors))
    shutil.rmtree(folder / "testdev_balanced_images")
    assert "no config testdev_balanced_images; there is: testdev_balanced_instructions" in refusal(
        "gqa", paths
    )


def test_a_mirror_comes_before_the_cache(tmp_path: Path, no_cache: Path) -> None:
    paths = one_mirror(tmp_path, "POPE")
    cached(no_cache, "lmms-lab", "POPE")
    assert opened("pope", paths).source.commit is None
    shutil.rmtree(paths.data)
    assert opened("pope", paths).source.commit == COMMIT
    assert task_hash(task("pope", revision="f" * 40).data, paths) is None, "that commit is not here"


def test_a_part_in_the_cache_is_none(tmp_path: Path, no_cache: Path) -> None:
    shard = next((cached(no_cache, "lmms-lab", "POPE") / "default").glob("test-00001*"))
    shard.unlink()
    shard.symlink_to("gone")
    message = refusal("pope", paths_in(tmp_path))
    assert message.startswith("pope: lmms-lab/POPE (default, test) is neither in")
    assert "Set download=true, or run: hf download lmms-lab/POPE --repo-type dataset" in message


def test_what_hf_download_noted_is_the_commit(tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "POPE")
    folder = Path(paths.data) / "lmms-lab" / "POPE"
    for path in folder.glob("default/*.parquet"):
        note = folder / ".cache/huggingface/download" / f"{path.relative_to(folder)}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{COMMIT}\netag\n1.0\n")
    assert opened("pope", paths, revision=COMMIT).source.commit == COMMIT
    assert f"of commit {COMMIT}, expected data.revision={'f' * 40}" in refusal(
        "pope", paths, revision="f" * 40
    )


def test_the_hash_is_of_the_files_of_the_split(tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "MMMU")
    data, folder = task("mmmu_val").data, Path(paths.data) / "lmms-lab" / "MMMU" / "default"
    before = task_hash(data, paths)
    write_shards(table_of(("MMMU", "default", "dev")).slice(1), folder, "dev", shards=2)
    assert task_hash(data, paths) == before
    assert task_hash(data, replace(paths, cache=str(tmp_path / "other"))) == before
    write_shards(
        table_of(("MMMU", "default", "validation"), lambda rows: rows.reverse()), folder, "validation", 2
    )
    assert task_hash(data, paths) != before
    assert opened("mmmu_val", paths).items[0].id == f"validation_Art_{SIZE - 1}", (
        "and so are the images' keys"
    )


def test_images_are_read_once(mirrors: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    before = asked(opened("ai2d", mirrors))
    monkeypatch.setattr(hub_records.Rows, "images", lambda *_: pytest.fail("read again"))
    assert asked(opened("ai2d", mirrors)) == before


def test_a_killed_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, added = one_mirror(tmp_path, "ai2d"), ImageStore.add
    contents: list[bytes] = []

    def add(store: ImageStore, content: bytes) -> str:
        contents.append(content)
        if len(contents) == 3:
            raise KeyboardInterrupt
        return added(store, content)

    monkeypatch.setattr(ImageStore, "add", add)
    with pytest.raises(KeyboardInterrupt):
        opened("ai2d", paths)
    assert opened("ai2d", paths).items
    assert len(contents) == SIZE + 1, "the third one twice"


def test_a_stored_image_that_changed_is_refused_and_a_deleted_one_is_made_again(tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "ai2d")
    stored = opened("ai2d", paths).items[2].images[0]
    file = ImageStore(Path(paths.cache) / "benchmark_images").path(stored.key)
    file.write_bytes(png(99))
    with pytest.raises(DataError, match=r"ai2d: row 2, image \(id 2\): .*has changed"):
        stored.load()
    file.unlink()
    assert pixels(opened("ai2d", paths).items[2].images[0]) == expected_pixels(2)


def every(**values: Any) -> Callable[[list[Row]], Any]:
    return lambda rows: [row.update(values) for row in rows]


def at(number: int, **values: Any) -> Callable[[list[Row]], Any]:
    return lambda rows: rows[number].update(values)


def test_a_null_is_what_the_hub_has_instead(mirrors: Paths, tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "MMBench", every(hint=None, C=None, D=None))
    for name in ("mmbench_cn_dev", "mmbench_en_dev"):
        assert asked(opened(name, paths)) == asked(opened(name, mirrors))
    paths = one_mirror(tmp_path / "other", "ScienceQA", at(0, hint=None))
    assert asked(opened("scienceqa_img", paths)) == asked(opened("scienceqa_img", mirrors))


@pytest.mark.parametrize(
    ("name", "folder", "change", "messages"),
    [
        (
            "ai2d",
            "ai2d",
            every(answer="4"),
            ["row 0: answer must be an index", "row 5: answer must be an index"],
        ),
        ("ai2d", "ai2d", at(1, question=None), ["row 1: ", "question is null"]),
        (
            "mmmu_val",
            "MMMU",
            at(1, image_3=None),
            ["row 1 (id validation_Art_1): image_3 is asked about, but is null"],
        ),
        ("seedbench", "SEED-Bench", at(1, image=[]), ["row 1: `image` holds no frame of the video"]),
        (
            "seedbench",
            "SEED-Bench",
            at(0, image=[image(1), image(2)]),
            ["row 0 (id q0): image is asked about, but is a list of 2"],
        ),
        (
            "seedbench",
            "SEED-Bench",
            at(1, image=[None]),
            ["row 1 (id q1): image[0] is asked about, but is a list of 1"],
        ),
        (
            "ai2d",
            "ai2d",
            at(1, image={"bytes": b"no image", "path": None}),
            ["ai2d: ", "row 1, image: not an image in any of"],
        ),
        (
            "ai2d",
            "ai2d",
            every(image={"bytes": png(1)[:20], "path": None}),
            ["row 0, image: ", "row 5, image: "],
        ),
        (
            "ai2d",
            "ai2d",
            at(3, image={"bytes": None, "path": "../../x.png"}),
            ["row 3, image: ", "only the path '../../x.png', which is not followed"],
        ),
        (
            "mmmu_val",
            "MMMU",
            at(1, id="validation_Art_0"),
            ["row 1: id 'validation_Art_0' occurs before, at number 0"],
        ),
        (
            "mmbench_en_dev",
            "MMBench",
            at(1, index=None),
            ["row 1: index must be text or a whole number, found None"],
        ),
        ("ai2d", "ai2d", list.pop, ["5 records, expected the published 6"]),
        ("ai2d", "ai2d", list.clear, ["has no rows"]),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, name: str, folder: str, change: Callable[[list[Row]], Any], messages: list[str]
) -> None:
    found = refusal(name, one_mirror(tmp_path, folder, change))
    for message in messages:
        assert message in found


def test_ids_of_a_json_list_are_of_one_kind_and_each_is_one_record(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    folder = Path(paths.data) / "toy"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png(0))
    record = {"question": "?", "answer": "yes", "image": "a.png"}

    def found(*ids: Any) -> str:
        (folder / "toy.json").write_text(json.dumps([record | {"id": one} for one in ids]))
        return refusal("gqa", paths, hub_id=None, folder="toy", records="toy.json", num_rows=None)

    assert "id is a number in some records and text in others" in found(1, "2")
    assert "record 2: id 'a' occurs before, at number 0" in found("a", "b", "a")
    assert "record 1: id must be text or a whole number, found 1.5" in found("a", 1.5)


def test_pixels_that_cannot_be_decoded_are_named_when_they_are_needed(tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "MMMU", at(2, image_1={"bytes": png(1)[:-40], "path": None}))
    found = opened("mmmu_val", paths)
    with pytest.raises(DataError, match=r"mmmu_val: row 2, image_1 \(id validation_Art_2\): damaged"):
        found.items[2].images[0].load()
    assert found.items[1].images[0].load()


def test_all_missing_images_of_another_config_are_listed_at_once(tmp_path: Path) -> None:
    paths = one_mirror(tmp_path, "GQA")
    folder = Path(paths.data) / "lmms-lab" / "GQA"
    key = ("GQA", "testdev_balanced_images", "testdev")
    write_shards(
        table_of(key, lambda rows: [row.update(id="x") for row in rows]), folder / key[1], "testdev", 2
    )
    found = refusal("gqa", paths)
    assert "id 'x' occurs 2 times" in found
    assert "no image with id 'n0', which 3 records ask about" in found
    assert "no image with id 'n1', which 3 records ask about" in found


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    table, folder = table_of(("POPE", "default", "test")), Path(paths.data) / "lmms-lab" / "POPE" / "data"
    write_shards(table.drop_columns(["answer", "question"]), folder, "test")
    found = refusal("pope", paths)
    assert "no column question, answer; found id (string), question_id (string)" in found
    write_shards(table.drop_columns(["image"]), folder, "test")
    assert "expected the image column image, with `bytes` and `path` as on the hub; found id" in refusal(
        "pope", paths
    )
    plain = table.set_column(table.schema.get_field_index("image"), "image", pa.array([png(0)] * SIZE))
    write_shards(plain, folder, "test")
    assert "image (binary)" in refusal("pope", paths)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"config": "Half"}, "there is no config Half; there is: default, Full"),
        ({"split": "dev"}, "config default has no split dev; it has: test"),
    ],
)
def test_configs_and_splits_that_are_there_are_listed(mirrors: Paths, data: Row, message: str) -> None:
    assert message in refusal("pope", mirrors, **data)
    sources = Sources()
    sources.task("pope", task("pope", **data).data, mirrors)
    assert message in next(iter(sources.missing))


def _pointer(path: Path) -> Any:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pointer, "is a git-LFS pointer, not the file. Run there: git lfs pull"),
        (lambda path: path.write_bytes(b""), "is empty."),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is no complete parquet file"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:4] + bytes(400) + path.read_bytes()[404:]),
            "cannot be read",
        ),
        (Path.unlink, "is not complete; it lacks default/test-00001-of-00002"),
        (
            lambda path: write_shards(table_of(("ai2d", "default", "test")), path.parent, "test", shards=2),
            "Are they of one version of the data set?",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    paths = one_mirror(tmp_path, "POPE")
    folder = Path(paths.data) / "lmms-lab" / "POPE" / "default"
    kept = (folder / "test-00000-of-00002.parquet").read_bytes()
    damage(folder / "test-00001-of-00002.parquet")
    (folder / "test-00000-of-00002.parquet").write_bytes(kept)
    found = refusal("pope", paths)
    assert message in found
    assert str(folder.parent) in found


def test_a_data_set_script_is_never_run(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    folder = Path(paths.data) / "lmms-lab" / "POPE"
    folder.mkdir(parents=True)
    (folder / "POPE.py").write_text("raise SystemExit('run')")
    assert "none with a parquet file. POPE.py is not run" in refusal("pope", paths)


def test_plan_names_every_missing_task_at_once(tmp_path: Path) -> None:
    paths, sources = one_mirror(tmp_path, "GQA"), Sources()
    hashes = {name: sources.task(name, one.data, paths) for name, one in suite().tasks.items()}
    assert len(hashes["gqa"]) == 64
    assert [sentence.split(":")[0] for sentence in sources.missing] == list(suite().tasks)[1:]
    assert "--include 'ScienceQA-IMG/test-*'" in next(iter(sources.missing))
    assert len(set(hashes.values())) == len(hashes), "English and Chinese MMBench are two tasks"


class Hub:
    """Stands in for the hub: repositories as folders."""

    def __init__(self, cache: Path, errors: dict[str, Exception]) -> None:
        self.cache, self.errors, self.asked = cache, errors, []

    def list_repo_files(self, hub_id: str, **kwargs: Any) -> list[str]:
        self.asked.append(hub_id)
        if hub_id in self.errors:
            raise self.errors[hub_id]
        self.repository = cached(self.cache / "remote", *hub_id.split("/"))
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*.*")]

    def hf_hub_download(self, hub_id: str, name: str, **kwargs: Any) -> str:
        return str(self.repository / name)

    def snapshot_download(self, hub_id: str, allow_patterns: list[str], **kwargs: Any) -> None:
        """Only what was asked for; `shutil` keeps the layout of the cache."""
        kept = {self.repository / name for name in allow_patterns}
        for path in self.repository.rglob("*.*"):
            if path not in kept:
                path.unlink()
        storage = self.repository.parent.parent
        storage.rename(self.cache / storage.name)


def _refused(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("no\nno",)
    return error


@pytest.fixture
def remote(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(no_cache, {})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_what_is_missing_is_downloaded_when_that_is_asked_for(
    tmp_path: Path, remote: Hub, mirrors: Paths
) -> None:
    remote.errors["lmms-lab/POPE"] = _refused(RepositoryNotFoundError)
    one = replace(suite(), tasks={"pope": task("pope")})
    config = replace(compose_config([]).config, suite=one, paths=paths_in(tmp_path))
    download_missing([config])
    refusal("pope", config.paths)
    assert remote.asked == []
    download_missing([replace(config, download=True)])
    found = opened("pope", config.paths)
    assert asked(found) == asked(opened("pope", mirrors))
    assert (found.source.hub_id, found.source.commit) == ("lmms-lab-encoder/POPE", COMMIT)
    assert not (remote.repository.parent / "Full").exists()
    before = list(remote.asked)
    download_missing([replace(config, download=True)])
    assert remote.asked == before == ["lmms-lab/POPE", "lmms-lab-encoder/POPE"]


def test_what_cannot_be_downloaded_is_named_at_once_with_what_to_do(tmp_path: Path, remote: Hub) -> None:
    for organisation, kind in (("lmms-lab", GatedRepoError), ("lmms-lab-encoder", RepositoryNotFoundError)):
        remote.errors |= {f"{organisation}/{name}": _refused(kind) for name in ("POPE", "MME")}
    tasks = {name: task(name) for name in ("pope", "mme")}
    config = compose_config(["download=true"]).config
    config = replace(config, suite=replace(suite(), tasks=tasks), paths=paths_in(tmp_path))
    with pytest.raises(DataError) as caught:
        download_missing([config])
    for name in ("POPE", "MME"):
        assert f"lmms-lab/{name}: gated: accept its terms at https://huggingface.co/" in str(caught.value)
        assert f"lmms-lab-encoder/{name}: there is no such data set" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, remote: Hub) -> None:
    config = replace(compose_config(["download=true"]).config, suite=suite(), paths=paths_in(tmp_path))
    remote.errors["lmms-lab/GQA"] = ConnectionError("no route")
    with pytest.raises(
        MorebenchError, match=r"lmms-lab/GQA could not be fetched: ConnectionError: no route"
    ) as caught:
        download_missing([config])
    assert caught.value.exit_code == 1
    assert remote.asked == ["lmms-lab/GQA"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("data_files: [{split: test, path: x/test-*}]", {"test": ["x/test-0.parquet"]}),
        (
            "data_files: [{split: test, path: [x/test-*, y/*]}]",
            {"test": ["x/test-0.parquet", "y/more.parquet"]},
        ),
        (
            "data_files: [{split: test, path: '**'}]",
            {"test": ["x/deep/test-1.parquet", "x/test-0.parquet", "y/more.parquet"]},
        ),
        ("data_files: x/*", {"train": ["x/test-0.parquet"]}),
        ("data_files: [./y/more.parquet]", {"train": ["y/more.parquet"]}),
        ("data_files: [{split: test, path: z/*}]", None),
    ],
)
def test_the_readme_says_which_files_are_which_split(
    entry: str, expected: dict[str, list[str]] | None
) -> None:
    names = [
        "x/test-0.parquet",
        "x/deep/test-1.parquet",
        "y/more.parquet",
        "y/z.csv",
        ".cache/test-0.parquet",
    ]
    found = layout_of(names, f"---\nlicense: mit\nconfigs:\n- config_name: one\n  {entry}\n---\n").configs
    assert found.get("one") == expected


@pytest.mark.parametrize(
    "head", ["configs: [{]", "configs: [x]", "configs: [{config_name: a, data_files: [{x: 1}]}]"]
)
def test_a_readme_that_cannot_be_understood_is_refused(head: str) -> None:
    with pytest.raises(DataError, match=r"README\.md"):
        layout_of(["a.parquet"], f"---\n{head}\n---\n")


def test_names_tell_config_and_split_where_no_readme_does() -> None:
    names = [
        "cn/dev-0.parquet",
        "en/test/0000.parquet",
        "data/dev-0.parquet",
        "val.parquet",
        "a/b/c/d.parquet",
    ]
    assert layout_of(names, "No front matter").configs == {
        "cn": {"dev": ["cn/dev-0.parquet"]},
        "en": {"test": ["en/test/0000.parquet"]},
        "default": {"dev": ["data/dev-0.parquet"], "val": ["val.parquet"]},
    }
