"""What a check finds and writes, that it goes on where it was killed, and what its hash follows."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories_data import paths_below, record, toy_data, write_data
from PIL import Image

from morebench.data import checked
from morebench.data.checked import CheckedData, check_folder, content_hash
from morebench.data.checking import looks, pictures
from morebench.data.checking.check import Checked, check_data
from morebench.data.checking.looks import Look, look
from morebench.data.findings import Kind
from morebench.data.image_folder import ImageFolder
from morebench.data.index import LengthIndex
from morebench.errors import EXIT_USER, ConfigError, DataError


def write(root: Path, num_records: int = 5) -> Path:
    """Records 0 ... with images 0.png ..., the last one text-only; returns the images' folder."""
    records = [record(i, f"{i}.png" if i < num_records - 1 else None) for i in range(num_records)]
    write_data(root, records, images=num_records - 1)
    return root / "data" / "toy" / "images"


def run(root: Path, workers: int = 0, again: bool = False, **changes: Any) -> Checked:
    data = replace(toy_data(), **changes)
    return check_data(data, paths_below(root), workers, lambda text: None, again=again)


def written(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (check_folder(toy_data(), paths_below(root)) / name).open()]


def ids(data: CheckedData) -> list[str]:
    return [sample.id for sample in data.samples]


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    images = write(tmp_path / "a")
    first = run(tmp_path / "a").data
    assert ids(first) == ["r0", "r1", "r2", "r3", "r4"]
    assert (first.manifest.num_records, first.manifest.num_samples, first.manifest.num_images) == (5, 5, 4)
    shutil.copytree(tmp_path / "a" / "data", tmp_path / "b" / "data")
    assert run(tmp_path / "b").data.content_hash == first.content_hash
    shutil.copy(images / "1.png", images / "0.png")
    assert run(tmp_path / "a").data.content_hash != first.content_hash
    records = tmp_path / "b" / "data" / "toy" / "records.json"
    records.write_text(records.read_text().replace("nice", "fine"))
    assert run(tmp_path / "b").data.content_hash != first.content_hash


def test_the_hash_by_hand() -> None:
    import hashlib

    expected = hashlib.sha256(bytes(32) + b"a.png\0" + b"ff" * 32 + b"\nb.png\0\n[1, 4]").hexdigest()
    assert content_hash("00" * 32, ["a.png", "b.png"], [b"\xff" * 32, b""], [1, 4]) == expected


def test_the_second_check_reads_only_what_changed(tmp_path: Path) -> None:
    images = write(tmp_path)
    first = run(tmp_path)
    assert first.num_looked_at == 4
    again = run(tmp_path)
    assert (again.num_looked_at, again.data.content_hash) == (0, first.data.content_hash)
    os.utime(images / "2.png", (1, 1))
    again = run(tmp_path)
    assert (again.num_looked_at, again.data.content_hash) == (1, first.data.content_hash)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"[]"])
def test_a_damaged_table_is_made_anew(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    first = run(tmp_path)
    (first.data.folder / looks.TABLE).write_bytes(content)
    again = run(tmp_path)
    assert (again.num_looked_at, again.data.content_hash) == (4, first.data.content_hash)


def bytes_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(pixels[:, :, c]) for c in range(channels)])


GIF = bytes_of(noise(), "GIF")
PLANTED: dict[str, tuple[bytes | None, Kind]] = {
    "missing.jpg": (None, Kind.missing),
    "empty.jpg": (b"", Kind.empty_file),
    "text.jpg": (b"not an image", Kind.not_an_image),
    "cut.jpg": (bytes_of(noise(size=(200, 200)), "JPEG")[:900], Kind.damaged),
    "strip.png": (bytes_of(Image.new("RGB", (1, 900)), "PNG"), Kind.too_long),
    "../secret.png": (b"x", Kind.outside),
    "/etc/passwd": (None, Kind.outside),
    "https://example.org/a.png": (None, Kind.outside),
    "a\0.png": (None, Kind.outside),
    "gif.jpg": (GIF, Kind.wrong_extension),
    "cmyk.jpg": (bytes_of(noise("CMYK"), "JPEG"), Kind.cmyk),
    "deep.png": (
        bytes_of(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "PNG"),
        Kind.deep,
    ),
    "moving.gif": (
        bytes_of(noise(), "GIF", save_all=True, append_images=[Image.new("RGB", (20, 16))]),
        Kind.animated,
    ),
    "blank.png": (bytes_of(Image.new("RGB", (9, 9), (3, 4, 5)), "PNG"), Kind.blank),
}


def plant(root: Path) -> list[str]:
    """One good record, then one with each image of PLANTED."""
    names = list(PLANTED)
    write_data(root, [record(0, "0.png"), *(record(1 + i, name) for i, name in enumerate(names))], images=1)
    for name, (content, _) in PLANTED.items():
        if content is not None:
            (root / "data" / "toy" / "images" / name).write_bytes(content)
    return names


def test_everything_that_can_be_wrong_with_an_image(tmp_path: Path) -> None:
    names = plant(tmp_path)
    found = run(tmp_path).data
    for name, (_, kind) in PLANTED.items():
        entries = written(tmp_path, checked.QUARANTINE if kind.quarantines else checked.FINDINGS)
        (entry,) = [entry for entry in entries if entry["image"] == name]
        assert (entry["kind"], entry["record"]) == (kind.name, 1 + names.index(name)), name
        text = (tmp_path / "data" / "toy" / "records.json").read_bytes()
        assert json.JSONDecoder().raw_decode(text[entry["offset"] :].decode())[0]["id"] == entry["id"]
        assert entry["reason"]
    usable = [kind for _, kind in PLANTED.values() if not kind.quarantines]
    assert found.manifest.kept == {kind.name: 1 for kind in usable}
    assert sum(found.manifest.quarantined.values()) == len(PLANTED) - len(usable)
    assert found.manifest.quarantined["outside"] == 4
    assert len(found.samples) == 1 + len(usable)
    assert (found.folder / "suspicious.png").stat().st_size > 1000
    assert Image.open(found.folder / "lengths.png").size[0] > 300


RECORDS: dict[str, tuple[dict[str, Any], Kind]] = {
    "roles": (
        record(1, conversations=[{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]),
        Kind.turns,
    ),
    "count": (record(1, "0.png") | {"image": ["0.png", "0.png"]}, Kind.image_count),
    "empty": (
        record(1, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]),
        Kind.empty_answer,
    ),
    "form": ({"id": "r1"}, Kind.malformed),
}


@pytest.mark.parametrize("name", RECORDS)
def test_everything_that_can_be_wrong_with_a_record(tmp_path: Path, name: str) -> None:
    bad, kind = RECORDS[name]
    write_data(tmp_path, [record(0, "0.png"), bad, record(2)], images=1)
    found = run(tmp_path).data
    assert ids(found) == ["r0", "r2"]
    assert (found.manifest.num_records, found.manifest.quarantined) == (3, {kind.name: 1})
    (entry,) = written(tmp_path, checked.QUARANTINE)
    assert (entry["kind"], entry["record"], entry["id"]) == (kind.name, 1, "r1")


def test_ids_that_repeat_are_counted_and_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write_data(tmp_path, [record(0, "0.png"), record(1), record(0), record(0, "gone.png")], images=1)
    found = run(tmp_path).data
    assert found.manifest.kept == {"duplicate_id": 1}  # the other one is quarantined, once
    assert found.manifest.quarantined == {"missing": 1}
    told = run(tmp_path, also_quarantine=["duplicate_id"]).data
    assert told.manifest.quarantined == {"missing": 1, "duplicate_id": 1}
    assert ids(told) == ["r0", "r1"]
    assert told.content_hash != found.content_hash


def test_kinds_that_do_not_exist_are_all_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, also_quarantine=["duplicate_ids", "missing", "cmyk"])
    assert "'duplicate_ids'" in str(caught.value)
    assert "Did you mean duplicate_id?" in str(caught.value)
    assert "'missing' is not one of" in str(caught.value)
    assert "'cmyk' is not" not in str(caught.value)


def test_another_judgement_of_the_same_files_is_another_hash(tmp_path: Path) -> None:
    """Another version of PIL may refuse what this one takes."""
    images = write(tmp_path)
    first = run(tmp_path).data
    shutil.rmtree(first.folder)
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:40])
    second = run(tmp_path).data
    assert ids(second) == ["r0", "r2", "r3", "r4"]
    assert second.content_hash != first.content_hash


def test_a_mended_image_is_noticed(tmp_path: Path) -> None:
    images = write(tmp_path)
    whole = run(tmp_path).data.content_hash
    kept = (images / "0.png").read_bytes()
    (images / "0.png").unlink()
    assert run(tmp_path).data.manifest.num_quarantined == 1
    (images / "0.png").write_bytes(kept)
    assert run(tmp_path).data.content_hash == whole


def die(images: ImageFolder, name: str) -> Look:
    """An image of this name takes the process with it, as a decoder's bug would."""
    if name in ("1.png", "7.png", "140.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return look(images, name)


def test_processes_look_at_every_image_once(tmp_path: Path) -> None:
    images = write(tmp_path, 200)
    names = [f"{number}.png" for number in range(199)]
    inside, _ = looks.look_at_all(names, ImageFolder(images), tmp_path / "a", 0)
    outside, looked = looks.look_at_all(names, ImageFolder(images), tmp_path / "b", 1)
    assert looked == 199
    assert outside.equals(inside)


def test_what_had_a_problem_is_read_again(tmp_path: Path) -> None:
    (write(tmp_path) / "1.png").write_bytes(b"no image")
    assert run(tmp_path).num_looked_at == 4
    assert run(tmp_path).num_looked_at == 1


def test_images_that_end_the_process_are_findings(tmp_path: Path) -> None:
    images = write(tmp_path, 200)
    names = [f"{number}.png" for number in range(199)]
    table, looked = looks.look_at_all(names, ImageFolder(images), tmp_path, 2, die)
    assert looked == 199
    assert table.column("name").to_pylist() == names
    crashed = [name for name, kind in zip(names, table.column("kind").to_pylist(), strict=True) if kind]
    assert crashed == ["1.png", "7.png", "140.png"]
    assert set(table.column("kind").to_pylist()) == {None, Kind.crashed.name}


def test_a_check_ends_well_with_such_an_image_and_does_not_decode_it_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr(looks, "look_at_all", partial(looks.look_at_all, look=die))
    decoded = []
    monkeypatch.setattr(pictures, "load_image", decoded.append)
    for _ in range(2):
        found = run(tmp_path, workers=1)
        assert found.data.manifest.quarantined == {Kind.crashed.name: 1}
        assert ids(found.data) == ["r0", "r2", "r3", "r4"]
    assert found.num_looked_at == 1  # it may be another day
    assert decoded == []


def stop_at_30(images: ImageFolder, name: str) -> Look:
    if name == "30.png":
        raise KeyboardInterrupt
    return look(images, name)


def test_an_interrupted_check_keeps_what_it_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "PART", 8)
    images = write(tmp_path, 41)
    names = [f"{number}.png" for number in range(40)]
    with pytest.raises(KeyboardInterrupt):
        looks.look_at_all(names, ImageFolder(images), tmp_path, 0, stop_at_30)
    (tmp_path / looks.PARTS / "torn.arrow").write_bytes(b"ARROW1 torn")
    table, looked = looks.look_at_all(names, ImageFolder(images), tmp_path, 0)
    assert looked == 40 - 24  # three parts of 8 were written
    whole, _ = looks.look_at_all(names, ImageFolder(images), tmp_path / "other", 0)
    assert table.equals(whole)
    looks.write_table(table, tmp_path)
    looks.remove_parts(tmp_path)
    assert looks.look_at_all(names, ImageFolder(images), tmp_path, 0)[1] == 0


def test_a_file_that_kept_its_size_and_time_is_read_again(tmp_path: Path) -> None:
    """As `cp -a`, `tar x` and `rsync -a` leave it, and a flipped bit."""
    images = write(tmp_path)
    whole = run(tmp_path).data.content_hash
    good, before = (images / "1.png").read_bytes(), (images / "1.png").stat()

    def put(content: bytes) -> None:
        (images / "1.png").write_bytes(content)
        os.utime(images / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))

    put(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    changed = run(tmp_path).data
    assert changed.manifest.quarantined == {"damaged": 1}
    put(good)
    assert run(tmp_path).data.content_hash == whole
    assert run(tmp_path, again=True).num_looked_at == 4


def test_a_check_that_goes_on_leaves_the_one_before_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts meanwhile must neither fail nor see half of it."""
    write(tmp_path)
    before = run(tmp_path).data.content_hash
    opened = []
    draw = pictures.draw_lengths

    def open_meanwhile(*arguments: Any) -> None:
        opened.append(checked.open_checked(toy_data(), paths_below(tmp_path)).content_hash)
        draw(*arguments)

    monkeypatch.setattr(pictures, "draw_lengths", open_meanwhile)
    (tmp_path / "data" / "toy" / "images" / "0.png").write_bytes(b"")
    after = run(tmp_path).data.content_hash
    run(tmp_path)
    assert opened == [before, after]
    assert before != after


def test_what_is_left_behind_by_a_killed_check_goes(tmp_path: Path) -> None:
    write(tmp_path)
    folder = check_folder(toy_data(), paths_below(tmp_path))
    folder.mkdir(parents=True)
    (folder / ".images.tmp-0123456789ab.arrow").write_bytes(b"half")
    run(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        checked.MANIFEST,
        checked.QUARANTINE,
        checked.FINDINGS,
        looks.TABLE,
        pictures.LENGTHS,
    }


def test_a_record_is_quarantined_or_kept_and_its_id_repeats_only_among_the_kept(tmp_path: Path) -> None:
    write_data(tmp_path, [record(0, "0.png"), record(1, "gone.png"), record(1), record(0, "cmyk.jpg")], 1)
    (tmp_path / "data" / "toy" / "images" / "cmyk.jpg").write_bytes(bytes_of(noise("CMYK"), "JPEG"))
    found = run(tmp_path).data.manifest
    assert (found.quarantined, found.kept) == ({"missing": 1}, {"duplicate_id": 1, "cmyk": 1})
    told = run(tmp_path, also_quarantine=["duplicate_id"]).data
    assert (told.manifest.quarantined, told.manifest.kept) == ({"missing": 1, "duplicate_id": 1}, {})
    assert ids(told) == ["r0", "r1"]
    assert written(tmp_path, checked.FINDINGS) == []


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; expected records") as caught:
        run(tmp_path)
    assert caught.value.exit_code == EXIT_USER
    (tmp_path / "data" / "toy").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder is empty; expected records"):
        run(tmp_path)
    write_data(tmp_path, [])
    with pytest.raises(DataError, match="list of records is empty"):
        run(tmp_path)
    images = write(tmp_path)
    shutil.rmtree(images)
    with pytest.raises(DataError, match="images: no such folder; expected the 4 images"):
        run(tmp_path)


def test_links_that_lead_out_are_findings_unless_allowed(tmp_path: Path) -> None:
    images = write(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (images / "0.png").rename(elsewhere / "0.png")
    (images / "0.png").symlink_to(elsewhere / "0.png")
    found = run(tmp_path).data
    assert found.manifest.quarantined == {"outside": 1}
    (entry,) = written(tmp_path, checked.QUARANTINE)
    assert f"allowed_links=[{elsewhere}]" in entry["reason"]
    assert not run(tmp_path, allowed_links=[str(elsewhere)]).data.manifest.quarantined


def test_token_lengths_are_measured_of_what_is_left(tmp_path: Path) -> None:
    write_data(tmp_path, [record(0, "gone.png"), *(record(i) for i in range(1, 9))])

    def measure(data: CheckedData) -> LengthIndex:
        counts = np.ones((4, len(data.samples)), np.int32)
        counts[0] = np.arange(100, 100 + len(data.samples))
        counts[1, 0] = 0
        return LengthIndex.of(counts)

    def fail(data: CheckedData) -> LengthIndex:
        raise DataError("no such token")

    measures = {"phi": measure, "broken": fail}
    found = check_data(toy_data(), paths_below(tmp_path), 0, lambda text: None, measures)
    assert found.problems == ["broken: no such token"]
    facts = found.data.manifest.tokens["phi"]
    assert facts["quantiles"] == {"50": 104, "90": 107, "99": 107, "100": 107}
    assert (facts["tokens"], facts["supervised"]) == (sum(range(100, 108)), 7)
    assert (facts["squared_lengths"], facts["images"]) == (sum(n * n for n in range(100, 108)), 8)
    assert (facts["truncated"], facts["unsupervised"]) == (8, 1)
    assert sum(facts["counts"]) == 8
    assert run(tmp_path).data.manifest.tokens == {"phi": facts}  # still true of the same samples
    write_data(tmp_path, [record(i) for i in range(1, 5)])
    assert run(tmp_path).data.manifest.tokens == {}
    characters = found.data.manifest.characters
    assert characters["quantiles"]["100"] == max(
        len(turn.question) + len(turn.answer) for sample in found.data.samples for turn in sample.turns
    )
