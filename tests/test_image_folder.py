"""No record reads a file outside the folder of images."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morebench.data.findings import Kind, SampleError
from morebench.data.image_folder import ImageFolder
from morebench.errors import ConfigError

OUTSIDE = [
    "",
    ".",
    "./",
    "/a.png",
    "//host/a.png",
    "../a.png",
    "a/../../b.png",
    "a/..",
    "a\0.png",
    "http://x.org/a.png",
    "file:/etc/passwd",
    "FILE:///etc/passwd",
    "data:image/png;base64,AAAA",
    "s3://bucket/a.png",
    "..\\a.png",
    "a\\..\\..\\b.png",
    "\\\\host\\share\\a.png",
    "C:\\a.png",
    "c:a.png",
    "half\ud83d.png",
]


@pytest.mark.parametrize("relative", OUTSIDE)
def test_paths_that_leave_the_folder(tmp_path: Path, relative: str):
    with pytest.raises(SampleError) as caught:
        ImageFolder(tmp_path).path(relative)
    assert caught.value.kind is Kind.outside
    assert str(tmp_path) in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    "relative",
    ["coco/train2017/0..1.jpg", "a", "..a/b..", "./a.png", "ab:c.png", "back\\slash.png", "gone/b.png"],
)
def test_paths_inside_the_folder(tmp_path: Path, relative: str):
    assert ImageFolder(tmp_path).path(relative) == tmp_path / relative


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """tmp_path/images, and tmp_path/shared/coco/train with an image each."""
    for folder in (tmp_path / "images" / "own", tmp_path / "shared" / "coco" / "train"):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"x")
    return tmp_path / "images"


def refused(folder: ImageFolder, relative: str) -> str:
    with pytest.raises(SampleError) as caught:
        folder.path(relative)
    assert caught.value.kind is Kind.outside
    return str(caught.value)


def test_a_link_out_of_the_folder_is_refused_with_what_would_allow_it(root: Path):
    coco = root.parent / "shared" / "coco"
    (root / "coco").symlink_to(coco)
    message = refused(ImageFolder(root), "coco/train/1.png")
    assert f"allowed_links=[{coco}]" in message
    for allowed in (coco, root.parent / "shared", root.parent, "/"):
        folder = ImageFolder(root, [str(allowed)])
        assert folder.path("coco/train/1.png").read_bytes() == b"x"
    for other in (root.parent / "shar", coco / "train" / "1.png", root.parent / "shared" / "coc"):
        refused(ImageFolder(root, [str(other)]), "coco/train/1.png")
    refused(ImageFolder(root, [str(coco / "val")]), "coco/train/1.png")


def test_an_allowed_folder_may_be_a_link_itself(root: Path):
    (root / "coco").symlink_to("../shared/coco")
    (root.parent / "alias").symlink_to(root.parent / "shared")
    assert ImageFolder(root, [str(root.parent / "alias")]).path("coco/train/1.png").exists()


def test_a_linked_image_is_looked_at_one_by_one(root: Path):
    target = root.parent / "shared" / "coco" / "train" / "1.png"
    (root / "own" / "2.png").symlink_to(target)
    folder = ImageFolder(root)
    assert folder.path("own/1.png").exists()
    assert f"allowed_links=[{target.parent}]" in refused(folder, "own/2.png")
    assert ImageFolder(root, [str(target.parent)]).path("own/2.png").exists()
    (root / "own" / "3.png").symlink_to(root / "own" / "1.png")
    assert folder.path("own/3.png").exists()
    (root / "own" / "4.png").symlink_to("/nowhere/4.png")
    refused(folder, "own/4.png")


def test_links_inside_and_up_and_through_each_other(root: Path):
    folder = ImageFolder(root)
    (root / "again").symlink_to("own")
    assert folder.path("again/1.png").exists()
    (root / "up").symlink_to("..")
    refused(folder, "up/shared/coco/train/1.png")
    assert folder.path("up/images/own/1.png").exists()  # out and in again
    (root / "a").symlink_to("up/shared")
    refused(folder, "a/coco/train/1.png")


def test_loops_of_links_do_not_hang(root: Path):
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    path = ImageFolder(root).path("a/1.png")
    with pytest.raises(OSError, match="symbolic links"):
        path.read_bytes()


def test_the_folder_itself_may_be_a_link(root: Path):
    alias = root.parent / "alias"
    alias.symlink_to(root)
    (root / "out").symlink_to("../shared")
    folder = ImageFolder(alias)
    assert folder.path("own/1.png") == alias / "own/1.png"
    refused(folder, "out/coco/train/1.png")


def test_names_too_long_are_no_crash(root: Path):
    for name in ("x" * 300 + ".png", "/".join(["x" * 200] * 50)):
        with pytest.raises(OSError, match="too long"):
            ImageFolder(root).path(name).read_bytes()


def test_relative_allowed_links_are_refused(root: Path):
    with pytest.raises(ConfigError, match="expected absolute paths"):
        ImageFolder(root, ["shared"])


def test_threads_and_processes_may_share_one(root: Path):
    (root / "coco").symlink_to("../shared/coco")
    folder = ImageFolder(root)

    def ask(number: int) -> bool:
        try:
            return folder.path("own/1.png" if number % 2 else "coco/train/1.png") is not None
        except SampleError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(200))) == [bool(number % 2) for number in range(200)]
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    refused(copy, "coco/train/1.png")


def test_the_cost_of_an_image_is_one_look_at_its_name(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = ImageFolder(root)
    folder.path("own/1.png")
    looked = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: looked.append(path) or lstat(path))
    for _ in range(5):
        folder.path("own/1.png")
    assert len(looked) == 5


@given(
    relative=st.lists(
        st.sampled_from(
            ["..", ".", "/", "\\", "own", "coco", "up", "1.png", ":", "file", "a", "\0", "~", "in"]
        ),
        max_size=8,
    ).map("".join)
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_let_through_is_inside(tmp_path_factory: pytest.TempPathFactory, relative: str):
    place = tmp_path_factory.getbasetemp() / "arbitrary"
    root = place / "images"
    if not place.exists():
        (root / "own").mkdir(parents=True)
        (root / "up").symlink_to("..")
        (root / "coco").symlink_to("/")
        (root / "in").symlink_to("own")
    try:
        path = ImageFolder(root).path(relative)
    except SampleError:
        return
    assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
