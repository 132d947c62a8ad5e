"""Pre-training subsets: the same bytes whatever way they are cut or killed, and everything counted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories_data import paths_below, toy_data
from factories_subset import Pair, add_member, pairs, picture, write_parquet, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morebench.data import build as command
from morebench.data.checked import open_checked
from morebench.data.checking.check import check_data
from morebench.data.subset import build as subset
from morebench.data.subset import ranking
from morebench.data.subset.build import Request, shares
from morebench.data.subset.candidates import rank_of
from morebench.data.subset.shards import PUBLISHED, Columns, Source, find_shards
from morebench.errors import ConfigError, DataError

TARS = Columns(id=None, caption=PUBLISHED["recap"].caption)


def source(folder: Path, images: Path | None = None, name: str = "recap", **columns: Any) -> Source:
    shards = find_shards([folder], images)
    assert not isinstance(shards, str), shards
    base = TARS if images is None else PUBLISHED["recap"]
    return Source(name, shards, images, Columns(**{**vars(base), **columns}))


def request(out: Path, *sources: Source, n: int, seed: int = 0) -> Request:
    return Request(out, "records.json", "images", sources, n, seed, {"n": n, "seed": seed})


def built(out: Path, *sources: Source, n: int, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    manifest, _ = subset.build(request(out, *sources, n=n, seed=seed), workers)
    return manifest


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, without the manifest."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def records(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "records.json").read_bytes()))


def ids(folder: Path) -> list[str]:
    return [record["id"] for record in records(folder)]


SAMPLES = [*pairs(14), *pairs(10, shard=1)]
SAMPLES += [
    Pair("000000003", "An id that is there already.", picture(501)),
    Pair("000020000", "The same image as another.", SAMPLES[5].content),
    Pair("000020001", "", picture(502)),
    Pair("000020002", "Cut off.", picture(503)[:-200]),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected")
    write_tar(folder / "in" / "0.tar", SAMPLES)
    built(folder / "out", source(folder / "in"), n=12)
    return contents(folder / "out")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(SAMPLES))),
    cuts=st.sets(st.integers(1, len(SAMPLES) - 1), max_size=4),
    workers=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 512]),
    wave=st.sampled_from([4, 50_000]),
)
def test_the_subset_does_not_depend_on_shards_order_or_workers(
    expected: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    cuts: set[int],
    workers: int,
    chunk: int,
    wave: int,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    edges = [0, *sorted(cuts), len(SAMPLES)]
    for number, (first, end) in enumerate(pairwise(edges)):
        rows = [SAMPLES[at] for at in order[first:end]]
        write_tar(folder / "in" / f"part{number % 2}" / f"{number}.tar", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("morebench.data.subset.draw.CHUNK", chunk)
        patch.setattr(ranking, "LEAST_WAVE", wave)
        built(folder / "out", source(folder / "in"), n=12, workers=workers)
    assert contents(folder / "out") == expected
    shutil.rmtree(folder)


def test_the_samples_of_least_rank_are_taken_in_order(tmp_path: Path) -> None:
    rows = pairs(30)
    write_tar(tmp_path / "in" / "0.tar", rows)
    built(tmp_path / "out", source(tmp_path / "in"), n=7, seed=5)
    ranked = sorted(rows, key=lambda row: rank_of(row.key, 5))[:7]
    assert ids(tmp_path / "out") == [row.key for row in ranked]
    for record, row in zip(records(tmp_path / "out"), ranked, strict=True):
        assert (tmp_path / "out" / "images" / record["image"]).read_bytes() == row.content
        question, answer = record["conversations"]
        assert (question["from"], answer["from"], answer["value"]) == ("human", "gpt", row.caption)
        assert question["value"].startswith("<image>\n") or question["value"].endswith("\n<image>")


def test_a_greater_n_begins_with_the_smaller_and_another_seed_draws_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", pairs(40))
    for name, n, seed in (("few", 5, 0), ("many", 20, 0), ("other", 20, 1)):
        built(tmp_path / name, source(tmp_path / "in"), n=n, seed=seed)
    assert ids(tmp_path / "many")[:5] == ids(tmp_path / "few")
    assert set(ids(tmp_path / "other")) != set(ids(tmp_path / "many"))


def test_parquet_and_tar_give_the_same_samples_and_links_or_copies_the_images(tmp_path: Path) -> None:
    rows = pairs(25)
    write_tar(tmp_path / "tars" / "0.tar", rows)
    write_parquet(tmp_path / "meta" / "0.parquet", rows, tmp_path / "files")
    built(tmp_path / "a", source(tmp_path / "tars"), n=10)
    built(tmp_path / "b", source(tmp_path / "meta", tmp_path / "files"), n=10)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    image = next((tmp_path / "b" / "images").rglob("*.jpg"))
    assert image.stat().st_nlink == 2


def test_training_can_open_what_was_built(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", SAMPLES)
    built(tmp_path / "data" / "toy", source(tmp_path / "in"), n=12)
    check_data(toy_data(), paths_below(tmp_path), 0, lambda text: None)
    opened = open_checked(toy_data(num_samples=12), paths_below(tmp_path), max_quarantined=0)
    assert len(opened.samples) == 12
    assert not opened.manifest.kept


def test_everything_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        *pairs(4),
        Pair("000010000", None, picture(90)),
        Pair("000010001", float("nan"), picture(91)),
        Pair("000010002", ["a", "list"], picture(92)),
        Pair("000010003", " \n", picture(93)),
        Pair("000010004", "no picture", None),
        Pair("000010005", "not a picture", b"<html>gone</html>"),
        Pair("000010006", "half a \ud83d", picture(94)),
        Pair("000000001", "again", picture(95)),
        Pair("000010007", "same bytes", picture(2)),
    ]
    path = write_tar(tmp_path / "in" / "0.tar", rows)
    with tarfile.open(path, "a") as archive:
        for name, changes in {
            "../up.jpg": {},
            "/root.jpg": {},
            "a.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "b.jpg": {"type": tarfile.LNKTYPE, "linkname": "000000000.jpg"},
            "c.jpg": {"type": tarfile.CHRTYPE},
            "d.jpg": {"type": tarfile.FIFOTYPE},
        }.items():
            add_member(archive, name, b"" if changes else picture(96), **changes)
    with pytest.raises(DataError, match=r"n=4\b"):
        built(tmp_path / "out", source(tmp_path / "in"), n=5)
    manifest = built(tmp_path / "out", source(tmp_path / "in"), n=4)
    found = manifest["sources"]["recap"]
    early = {"no_caption": 3, "caption_not_text": 2, "no_image": 1, "refused_member": 6}
    assert found["left_out_before_ranking"] == early
    assert (found["rows"], found["candidates"]) == (13, 7)
    assert sorted(ids(tmp_path / "out"))[0] == "000000000"
    assert not (tmp_path / "up.jpg").exists()
    assert found["looked_at"] == found["taken"] + sum(found["left_out"].values())


def test_the_reasons_of_a_shortage_are_told_with_numbers(tmp_path: Path) -> None:
    rows = [*pairs(4), Pair("000010001", "same bytes", picture(2)), Pair("000010002", "bad", b"x")]
    rows += [
        Pair("000010003", "gone", None),
        Pair("../../evil", "out", None),
        Pair("000000001", "again", None),
    ]
    write_parquet(tmp_path / "in" / "0.parquet", rows, tmp_path / "files")
    with pytest.raises(DataError) as caught:
        built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=9)
    told = str(caught.value)
    for part in (
        "4 of 9",
        "9 candidates",
        "1 image is missing",
        "1 image path, or a link on it, leads outside",
        "n=4",
    ):
        assert part in told
    for part in ("1 image cannot be used", "1 id was taken before", "1 image was taken before"):
        assert part in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [100, 5_000, 10_240 - 300, -1])
def test_a_cut_off_tar_gives_what_was_whole_and_is_named(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "in" / "0.tar", pairs(6))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] if cut > 0 else whole[: whole.rindex(b"}") + 1].ljust(13 * 1024, b"\1"))
    write_tar(tmp_path / "in" / "1.tar", pairs(5, shard=1))
    manifest = built(tmp_path / "out", source(tmp_path / "in"), n=3)
    damaged, good = manifest["sources"]["recap"]["shards"]
    assert "damaged or cut off" in damaged["damage"]
    assert "damage" not in good


def test_a_damaged_parquet_file_is_counted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in" / "0.parquet", pairs(30), tmp_path / "files")
    write_parquet(tmp_path / "in" / "1.parquet", pairs(20, shard=1), tmp_path / "files")
    content = bytearray(path.read_bytes())
    content[20:900] = bytes(880)
    path.write_bytes(content)
    (tmp_path / "in" / "2.parquet").write_bytes(b"PAR1 nothing")
    manifest = built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=10)
    shards = manifest["sources"]["recap"]["shards"]
    assert ["damage" in shard for shard in shards] == [True, False, True]


def test_img2dataset_tables_leave_failed_downloads_out(tmp_path: Path) -> None:
    rows = pairs(6)
    write_parquet(tmp_path / "0.parquet", rows, tmp_path / "files")
    table = pq.read_table(tmp_path / "0.parquet")
    status = pa.array(["success", "failed_to_download", "success"] * 2)
    table = table.append_column("status", status).append_column("error_message", pa.nulls(6))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    manifest = built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=4)
    assert manifest["sources"]["recap"]["left_out_before_ranking"] == {"not_downloaded": 2}


def test_bytes_that_are_no_text_and_columns_of_another_type_are_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pairs(4), tmp_path / "files")
    table = pq.read_table(tmp_path / "a.parquet")
    odd = pa.Array.from_buffers(
        pa.string(), 4, pa.array([b"ok", b"\xff\xfe", b"fine", b""], pa.binary()).buffers()
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table.set_column(1, "re_caption", odd), tmp_path / "in" / "0.parquet")
    numbers = pa.array([1.5, float("nan"), None, 2.0])
    pq.write_table(table.set_column(1, "re_caption", numbers), tmp_path / "in" / "1.parquet")
    manifest = built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=2)
    found = manifest["sources"]["recap"]["left_out_before_ranking"]
    assert found == {"no_caption": 3, "caption_not_text": 3}


def test_a_mix_has_half_of_each_and_no_image_twice(tmp_path: Path) -> None:
    assert shares(7, 2) == [4, 3]
    shared = [Pair(f"00009{n:04d}", "both have it", picture(n)) for n in range(20)]
    write_tar(tmp_path / "laion" / "0.tar", pairs(20))
    write_tar(tmp_path / "recap" / "0.tar", [*shared, *pairs(12, shard=3)])
    sources = [source(tmp_path / name, name=name) for name in ("laion", "recap")]
    manifest = built(tmp_path / "out", *sources, n=31)
    found = records(tmp_path / "out")
    assert [one["id"].split("_")[0] for one in found] == ["laion"] * 16 + ["recap"] * 15
    assert len({one["image"] for one in found}) == len({one["id"] for one in found}) == 31
    assert manifest["sources"]["recap"]["left_out"]["in_other_source"] > 0
    with pytest.raises(DataError, match=r"n=25\b"):  # behind all 20 of the first, 12 of the second are left
        built(tmp_path / "more", *sources, n=60)
    built(tmp_path / "more", *sources, n=25)


def test_large_shards_are_read_by_processes(
    expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_tar(tmp_path / "in" / f"{number}.tar", SAMPLES[number::3])
    monkeypatch.setattr("morebench.data.subset.scan.WORTH_PROCESSES", 0)
    built(tmp_path / "out", source(tmp_path / "in"), n=12, workers=3)
    assert contents(tmp_path / "out") == expected


def test_linked_folders_are_followed_once_and_tables_of_a_build_are_no_input(tmp_path: Path) -> None:
    write_tar(tmp_path / "elsewhere" / "0.tar", pairs(8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    with pytest.raises(DataError):
        built(tmp_path / "in" / "out", source(tmp_path / "in"), n=9)
    assert len(source(tmp_path / "in").shards) == 1


KILLED = """
import os, signal, sys
import morebench.data.subset.{module} as module
real, calls = module.{owner}{name}, 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
module.{owner}{name} = dying
module_draw = __import__("morebench.data.subset.draw", fromlist=["x"])
module_draw.CHUNK = 4
from pathlib import Path
from morebench.data.subset.build import Request, build
from morebench.data.subset.shards import Columns, Source, find_shards
folder = Path(sys.argv[1])
columns = Columns(id=None, caption=("re_caption",))
source = Source("recap", find_shards([folder / "in"], None), None, columns)
build(Request(folder / "killed", "records.json", "images", (source,), 10, 0, {{"n": 10, "seed": 0}}), 2)
"""

DEATHS = [
    ("scan", "", "scan_tar", 2, 1),
    ("scan", "Path.", "replace", 2, 0),
    ("look", "Path.", "replace", 9, 3),
    ("journal", "json.", "dumps", 7, 3),
    ("build", "", "_remove_surplus", 1, 3),
    ("build", "json.", "dumps", 12, 3),
    ("build", "shutil.", "rmtree", 1, 3),
]


@pytest.mark.parametrize(("module", "owner", "name", "after", "finished"), DEATHS)
def test_a_killed_build_ends_in_the_same_bytes(
    tmp_path: Path, module: str, owner: str, name: str, after: int, finished: int
) -> None:
    for number in range(3):
        write_tar(tmp_path / "in" / f"{number}.tar", pairs(8, number))
    script = KILLED.format(module=module, owner=owner, name=name, after=after)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "killed.building").glob("shards/*.json"))) == finished
    for folder in ("killed", "whole"):
        built(tmp_path / folder, source(tmp_path / "in"), n=10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    manifests = [(tmp_path / one / "manifest.json").read_bytes() for one in ("killed", "whole")]
    assert manifests[0] == manifests[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "killed", "whole"]


def test_finished_shards_and_images_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "in" / "0.tar", pairs(8))
    with pytest.raises(DataError):
        built(tmp_path / "out", source(tmp_path / "in"), n=9)
    monkeypatch.setattr("morebench.data.subset.scan.scan_tar", None)
    monkeypatch.setattr("morebench.data.subset.look.decode_image", None)
    built(tmp_path / "out", source(tmp_path / "in"), n=8)


def test_images_that_came_since_and_changed_shards_are_seen(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "0.parquet", pairs(8), tmp_path / "files")
    image = tmp_path / "files" / "00000" / "000000004.jpg"
    image.rename(tmp_path / "kept.jpg")
    with pytest.raises(DataError, match="1 image is missing"):
        built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=8)
    (tmp_path / "kept.jpg").rename(image)
    time.sleep(0.01)
    rows = [*pairs(8), Pair("000000008", "new", picture(8))]
    write_parquet(tmp_path / "in" / "0.parquet", rows, tmp_path / "files")
    built(tmp_path / "out", source(tmp_path / "in", tmp_path / "files"), n=9)
    assert len(ids(tmp_path / "out")) == 9


def test_unknown_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "0.parquet", pairs(2), tmp_path, field="caption")
    write_parquet(tmp_path / "in" / "1.parquet", pairs(2), tmp_path, field="text")
    with pytest.raises(ConfigError) as caught:
        built(tmp_path / "out", source(tmp_path / "in", tmp_path), n=1)
    assert "no column re_caption (columns.caption). It has url, caption, key." in str(caught.value)
    assert "It has url, text, key." in str(caught.value)
    write_tar(tmp_path / "tars" / "0.tar", pairs(2), field="caption")
    with pytest.raises(ConfigError, match=r"re_caption.*Its fields: txt, key, caption, status|Its fields: "):
        built(tmp_path / "out", source(tmp_path / "tars"), n=1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["source=", "laion_recap"]),
        (["source=recpa"], ["Did you mean recap?"]),
        (["source=recap"], ["input=... is missing"]),
        (
            ["source=laion_recap", "input.laion=/nowhere", "n=1", "seed=-1", "colour=red"],
            ["/nowhere: No such", "input.recap=... is missing", "n=1", "seed=-1", "colour"],
        ),
        (["source=recap", "input=/", "input=/"], ["there twice"]),
        (["source=recap", "input=/nowhere", "paths.dta=/x"], ["paths.dta"]),
    ],
)
def test_mistakes_are_told_all_at_once(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        command.command(arguments)
    for part in parts:
        assert part in str(caught.value)


def test_an_existing_folder_is_never_written_into(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", pairs(8))
    built(tmp_path / "out", source(tmp_path / "in"), n=4)
    before = contents(tmp_path / "out")
    _, was_there = subset.build(request(tmp_path / "out", source(tmp_path / "in"), n=4), 1)
    assert was_there
    for n, folder in ((5, tmp_path / "out"), (4, tmp_path / "in")):
        with pytest.raises(ConfigError, match="exists and holds"):
            built(folder, source(tmp_path / "in"), n=n)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("door", [["-m", "morebench.data"], ["-m", "morebench", "data"]])
def test_the_command_as_typed(tmp_path: Path, door: list[str]) -> None:
    write_tar(tmp_path / "my shards" / "0.tar", pairs(8))

    def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MOREBENCH_ROOT": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *door, *arguments], capture_output=True, text=True, env=environment
        )

    done = typed("build", "source=recap", "input=their shards", "n=4")
    assert done.returncode == 2
    done = typed("build", "source=recap", f"input={tmp_path}/my shards", "n=4")
    assert done.returncode == 0, done.stderr
    assert "4 taken" in done.stdout
    assert "pretrain_data.num_samples=4" in done.stderr
    assert (tmp_path / "data" / "recap_558k" / "recap_558k.json").exists()
    assert typed("build", "--help").stdout.startswith("Build a pre-training subset")
    assert "build" in typed("--help").stdout
    wrong = typed("biuld")
    assert wrong.returncode == 2
    assert "Did you mean build?" in wrong.stderr


def test_links_out_of_the_image_folder_are_followed_only_where_allowed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "0.parquet", pairs(8), tmp_path / "files")
    (tmp_path / "files").rename(tmp_path / "elsewhere")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "00000").symlink_to(tmp_path / "elsewhere" / "00000")
    given = source(tmp_path / "in", tmp_path / "files")
    with pytest.raises(DataError, match="8 image path, or a link on it, leads outside"):
        built(tmp_path / "out", given, n=8)
    allowed = replace(given, allowed_links=(str(tmp_path / "elsewhere"),))
    built(tmp_path / "out", allowed, n=8)
    assert len(ids(tmp_path / "out")) == 8
