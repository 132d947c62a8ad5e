"""Opening what was checked: stale or damaged checks are refused, and so is every byte that is another."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories_data import paths_below, record, toy_data, write_data

from morebench.data import checked
from morebench.data.checked import TABLE, CheckedData, Status, data_state, open_checked
from morebench.data.checking.check import check_data
from morebench.errors import DataError


def prepare(root: Path, num_records: int = 4) -> Path:
    """The last record is text-only, the first one's image is missing; returns the images' folder."""
    names = ["gone.png", *(f"{i}.png" for i in range(1, num_records - 1)), None]
    write_data(root, [record(i, name) for i, name in enumerate(names)], images=num_records)
    check(root)
    return root / "data" / "toy" / "images"


def check(root: Path, **changes: Any) -> CheckedData:
    return check_data(replace(toy_data(), **changes), paths_below(root), 0, lambda text: None).data


def status(root: Path, **changes: Any) -> Status:
    return data_state(replace(toy_data(), **changes), paths_below(root)).status


def test_what_is_opened_is_what_was_checked(tmp_path: Path) -> None:
    assert status(tmp_path) is Status.absent
    images = prepare(tmp_path)
    assert status(tmp_path) is Status.checked
    opened, made = open_checked(toy_data(), paths_below(tmp_path)), check(tmp_path)
    assert list(opened.samples) == list(made.samples)
    assert [sample.id for sample in opened.samples] == ["r1", "r2", "r3"]
    assert opened.manifest.content_hash == made.content_hash
    again = pickle.loads(pickle.dumps(opened))  # as a worker process gets it
    for data in (opened, again):
        assert data.read_images(0) == [(images / "1.png").read_bytes()]
        assert data.read_images(1) == [(images / "2.png").read_bytes()]
        assert data.read_images(2) == []
    assert len(pickle.dumps(opened)) < 10_000  # no image's digest travels


def test_an_image_that_changed_since_is_named_at_the_start_and_refused_when_read(tmp_path: Path) -> None:
    images = prepare(tmp_path)
    opened = open_checked(toy_data(), paths_below(tmp_path))
    assert opened.changed_images() == []
    before = (images / "1.png").stat()
    other = bytearray((images / "1.png").read_bytes())
    other[-20] ^= 1
    (images / "1.png").write_bytes(bytes(other))
    assert opened.changed_images() == ["1.png"]
    os.utime(images / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened.changed_images() == []  # size and time cannot tell
    with pytest.raises(DataError, match=r"record id 'r1': image 1\.png is not the file that was checked"):
        opened.read_images(0)
    (images / "2.png").unlink()
    with pytest.raises(DataError, match=r"record id 'r2': image 2\.png: No such file"):
        opened.read_images(1)


def test_stale_and_damaged_checks_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    folder = checked.check_folder(toy_data(), paths_below(tmp_path))
    kept = {name: (folder / name).read_bytes() for name in (checked.MANIFEST, checked.QUARANTINE)}
    for name, content in kept.items():
        for damaged in (b"", b"{}", content[:-9]):
            (folder / name).write_bytes(damaged)
            assert status(tmp_path) is Status.unchecked
            with pytest.raises(
                DataError, match=r"has not been checked\. Run `python -m morebench\.data check`"
            ):
                open_checked(toy_data(), paths_below(tmp_path))
        (folder / name).write_bytes(content)
        assert status(tmp_path) is Status.checked
    assert status(tmp_path, also_quarantine=["blank"]) is Status.stale
    records = tmp_path / "data" / "toy" / "records.json"
    records.write_text(records.read_text().replace("nice", "fine"))
    assert status(tmp_path) is Status.stale
    with pytest.raises(DataError, match="has changed since it was checked"):
        open_checked(toy_data(), paths_below(tmp_path))
    check(tmp_path)
    assert status(tmp_path) is Status.checked


def test_a_list_that_somebody_shortened_is_not_the_list_that_was_checked(tmp_path: Path) -> None:
    prepare(tmp_path)
    path = checked.check_folder(toy_data(), paths_below(tmp_path)) / checked.QUARANTINE
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["id"] == "r0"
    path.write_text("")
    assert status(tmp_path) is Status.unchecked


def test_links_that_are_no_longer_allowed_make_a_check_stale(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert status(tmp_path, allowed_links=["/elsewhere"]) is Status.stale


def test_another_table_of_images_than_the_one_that_was_written_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path / "other", 6)
    prepare(tmp_path)
    paths = paths_below(tmp_path)
    opened = pickle.dumps(open_checked(toy_data(), paths))
    folders = [checked.check_folder(toy_data(), paths_below(root)) for root in (tmp_path / "other", tmp_path)]
    shutil.copy(folders[0] / TABLE, folders[1] / TABLE)
    with pytest.raises(DataError, match=r"is not what the check of Toy wrote"):
        open_checked(toy_data(), paths)
    with pytest.raises(DataError, match=r"is not what the check of Toy wrote"):  # in a worker that starts now
        pickle.loads(opened).read_images(0)


def test_too_many_quarantined_samples_are_refused_with_the_reasons(tmp_path: Path) -> None:
    prepare(tmp_path)
    paths = paths_below(tmp_path)
    assert len(open_checked(toy_data(), paths, max_quarantined=0.25).samples) == 3
    with pytest.raises(DataError) as caught:
        open_checked(toy_data(), paths, max_quarantined=0.2)
    message = str(caught.value)
    assert "1 of 4 records (25.00%) are quarantined, more than max_quarantined=0.2" in message
    assert "1 x image is missing" in message
    assert "quarantine.jsonl" in message


def test_another_count_than_the_published_one_counts_bad_records_too(tmp_path: Path) -> None:
    prepare(tmp_path)
    paths = paths_below(tmp_path)
    assert open_checked(toy_data(num_samples=4), paths).manifest.num_samples == 3
    with pytest.raises(DataError, match="4 records; published are 558,128"):
        open_checked(toy_data(num_samples=558128), paths)


def test_nothing_left_after_quarantine(tmp_path: Path) -> None:
    write_data(tmp_path, [record(0, "gone.png"), record(1, "lost.png")])
    (tmp_path / "data" / "toy" / "images").mkdir(exist_ok=True)
    assert check(tmp_path).manifest.num_samples == 0
    with pytest.raises(DataError, match="all records are quarantined: 2 x image is missing"):
        open_checked(toy_data(), paths_below(tmp_path))


def test_the_store_of_records_may_be_made_anew(tmp_path: Path) -> None:
    prepare(tmp_path)
    before = open_checked(toy_data(), paths_below(tmp_path))
    samples = list(before.samples)
    shutil.rmtree(tmp_path / "cache")
    assert list(open_checked(toy_data(), paths_below(tmp_path)).samples) == samples
