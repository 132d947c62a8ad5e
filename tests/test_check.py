import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from factories_data import paths_below, record, toy_data, write_data

from morebench.config.schema import ImagePolicy
from morebench.data import check
from morebench.data.check import CheckedData, open_data, peek_hash
from morebench.errors import EXIT_USER, DataError

ERROR, QUARANTINE = ImagePolicy.error, ImagePolicy.quarantine


def write(root: Path, num_records: int = 5) -> Path:
    """Records 0 ... with images 0.png ..., the last one text-only; returns the images' folder."""
    records = [record(i, f"{i}.png" if i < num_records - 1 else None) for i in range(num_records)]
    write_data(root, records, images=num_records - 1)
    return root / "data" / "toy" / "images"


def look(root: Path, policy: ImagePolicy = ERROR, num_samples: int | None = None) -> CheckedData:
    return open_data(toy_data(num_samples), paths_below(root), policy)


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path):
    images = write(tmp_path / "a")
    first = look(tmp_path / "a")
    assert [sample.id for sample in first.samples] == ["r0", "r1", "r2", "r3", "r4"]
    assert first.num_records == 5
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert look(tmp_path / "b").content_hash == first.content_hash
    assert look(tmp_path / "a", QUARANTINE).content_hash == first.content_hash
    shutil.copy(images / "1.png", images / "0.png")
    assert look(tmp_path / "a").content_hash != first.content_hash
    records = tmp_path / "b" / "data" / "toy" / "records.json"
    records.write_text(records.read_text().replace("nice", "fine"))
    assert look(tmp_path / "b").content_hash != first.content_hash


def test_the_second_call_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = write(tmp_path)
    first = look(tmp_path)
    decoded = []
    decode = check.decode_image
    monkeypatch.setattr(check, "decode_image", lambda content: decoded.append(content) or decode(content))
    assert look(tmp_path).content_hash == first.content_hash
    assert decoded == []
    os.utime(images / "2.png", (1, 1))
    assert look(tmp_path).content_hash == first.content_hash
    assert decoded == [(images / "2.png").read_bytes()]


def test_a_damaged_manifest_is_made_anew(tmp_path: Path):
    write(tmp_path)
    first = look(tmp_path)
    (manifest,) = (tmp_path / "cache" / "data").iterdir()
    for content in ("{", "[]", '{"version": 1, "images": {"0.png": 3}}'):
        manifest.write_text(content)
        assert look(tmp_path).content_hash == first.content_hash


def damage(images: Path) -> None:
    (images / "0.png").unlink()
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(whole[: len(whole) // 2])
    (images / "3.png").write_text("no image")


def test_bad_images_are_all_named_and_nothing_is_written(tmp_path: Path):
    damage(write(tmp_path))
    with pytest.raises(DataError) as caught:
        look(tmp_path)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_USER
    assert "3 of 5 records" in message
    assert "record 0 (id 'r0'): image" in message
    assert "0.png: No such file" in message
    assert "2.png: damaged or truncated" in message
    assert "3.png: not an image" in message
    assert "on_bad_image=quarantine" in message
    assert not (tmp_path / "cache" / "data").exists()


def test_one_bad_image_is_one_line(tmp_path: Path):
    (write(tmp_path) / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"record 0 \(id 'r0'\): image .*0\.png: the file is empty") as caught:
        look(tmp_path)
    assert "\n" not in str(caught.value)


def test_quarantine_leaves_the_sample_out_and_is_part_of_the_hash(tmp_path: Path):
    images = write(tmp_path)
    whole = look(tmp_path)
    damage(images)
    first = look(tmp_path, QUARANTINE)
    assert [sample.id for sample in first.samples] == ["r1", "r4"]
    assert [(bad.id, bad.image) for bad in first.quarantined] == [
        ("r0", "0.png"),
        ("r2", "2.png"),
        ("r3", "3.png"),
    ]
    assert first.num_records == 5
    assert first.content_hash != whole.content_hash
    again = look(tmp_path, QUARANTINE)  # from the manifest
    assert list(again.samples) == list(first.samples)
    assert replace(again, samples=first.samples) == first


def test_another_judgement_of_the_same_files_is_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another version of PIL may refuse what this one takes."""
    images = write(tmp_path)
    first = look(tmp_path, QUARANTINE)
    shutil.rmtree(tmp_path / "cache")
    refused = (images / "1.png").read_bytes()

    def decode(content: bytes) -> None:
        if content == refused:
            raise DataError("refused")

    monkeypatch.setattr(check, "decode_image", decode)
    second = look(tmp_path, QUARANTINE)
    assert [bad.id for bad in second.quarantined] == ["r1"]
    assert second.content_hash != first.content_hash


def test_a_mended_image_is_noticed(tmp_path: Path):
    images = write(tmp_path)
    whole = look(tmp_path)
    kept = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(kept[:40])
    assert len(look(tmp_path, QUARANTINE).quarantined) == 1
    (images / "0.png").write_bytes(kept)
    assert look(tmp_path).content_hash == whole.content_hash


def test_bad_records_are_all_named(tmp_path: Path):
    write_data(tmp_path, [record(i, conversations=[]) if i % 2 else record(i) for i in range(100)])
    with pytest.raises(DataError) as caught:
        look(tmp_path)
    message = str(caught.value)
    assert "50 of 100 records" in message
    assert "record 3 (id 'r3')" in message
    assert "30 more of this kind" in message


@pytest.mark.parametrize("policy", [ERROR, QUARANTINE])
def test_links_out_of_the_image_folder_must_be_allowed(tmp_path: Path, policy: ImagePolicy):
    images = write(tmp_path)
    shutil.move(images / "1.png", tmp_path / "1.png")
    (images / "1.png").symlink_to(tmp_path / "1.png")
    with pytest.raises(DataError, match=rf"record 1 \(id 'r1'\): image .* allowed_links=\[{tmp_path}\]"):
        look(tmp_path, policy)
    data = replace(toy_data(), allowed_links=[str(tmp_path)])
    assert len(open_data(data, paths_below(tmp_path), policy).samples) == 5


def test_nothing_left_after_quarantine(tmp_path: Path):
    write_data(tmp_path, [record(0, "gone.png")])
    with pytest.raises(DataError, match="all samples are quarantined"):
        look(tmp_path, QUARANTINE)


@pytest.mark.parametrize("policy", [ERROR, QUARANTINE])
@pytest.mark.parametrize("image", ["../../x.png", "/etc/passwd", "https://example.org/a.png", "a\0.png"])
def test_images_outside_the_folder_are_refused(tmp_path: Path, image: str, policy: ImagePolicy):
    write_data(tmp_path, [record(0), record(1, image)])
    with pytest.raises(DataError, match=r"record 1 \(id 'r1'\): image"):
        look(tmp_path, policy)


def test_links_inside_the_folder_are_followed(tmp_path: Path):
    images = write(tmp_path)
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    assert len(look(tmp_path).samples) == 5


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder; expected records"):
        look(tmp_path)
    (tmp_path / "data" / "toy").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder is empty; expected records"):
        look(tmp_path)
    write_data(tmp_path, [])
    with pytest.raises(DataError, match="list of records is empty"):
        look(tmp_path)
    images = write(tmp_path)
    shutil.rmtree(images)
    with pytest.raises(DataError, match="images: no such folder; expected the 4 images"):
        look(tmp_path)


def test_another_count_than_the_published_one(tmp_path: Path):
    write(tmp_path)
    assert look(tmp_path, num_samples=5).num_records == 5
    with pytest.raises(DataError, match="5 records; Toy has 558128"):
        look(tmp_path, num_samples=558128)


def test_peek(tmp_path: Path):
    assert peek_hash(toy_data(), paths_below(tmp_path), ERROR) is None
    write(tmp_path)
    assert peek_hash(toy_data(), paths_below(tmp_path), ERROR) == look(tmp_path).content_hash
