"""The stand-in of the published data: what the loader reads, with what it says is broken and nothing else."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from morebench.config.compose import ROOT
from morebench.data.findings import Kind
from morebench.data.images import decode_image
from morebench.data.records import Sample, iter_records
from morebench.errors import DataError

SCALE = 0.0005


def run(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "stand_in.py"), str(out), "--scale", str(SCALE)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stand_in")


@pytest.fixture(scope="module")
def made(out: Path) -> dict[str, Any]:
    return run(out)


def files_of(out: Path, name: str) -> tuple[Path, Path]:
    """Records file and images root."""
    if name == "pretrain":
        folder = out / "llava_pretrain"
        return folder / "blip_laion_cc_sbu_558k.json", folder / "images"
    folder = out / "llava_instruct"
    return folder / "llava_v1_5_mix665k.json", folder


def test_counts_are_the_published_ones_scaled(made: dict[str, Any]) -> None:
    sources = made["pretrain"]["sources"] | made["instruct"]["sources"]
    expected = {"lcs": 558_128, "vqav2": 82_783, "okvqa": 8_998, "aokvqa": 66_160, "refcoco": 48_447}
    expected |= {"llava_instruct": 157_712, "gqa": 72_140, "ocr_vqa": 80_000, "textcaps": 21_953}
    expected |= {"vg": 86_417, "sharegpt": 40_688}
    assert sources == {name: round(count * SCALE) for name, count in expected.items()}
    assert sum(expected.values()) == 558_128 + 665_298


@pytest.mark.parametrize("name", ["pretrain", "instruct"])
def test_records_are_read_and_what_is_broken_is_what_it_says(
    out: Path, made: dict[str, Any], name: str
) -> None:
    path, root = files_of(out, name)
    with path.open("rb") as file:
        parsed = list(iter_records(file, path))
    raw = json.loads(path.read_text())
    assert len(parsed) == len(raw) == made[name]["records"]
    found: Counter[str] = Counter()
    images: set[str] = set()
    for one in parsed:
        if isinstance(one, DataError):
            found["turns" if "roles must alternate" in str(one) else "image_count"] += 1
            continue
        found["empty_answer"] += any(not turn.answer for turn in one.turns)
        found["outside"] += any(image.startswith("../") for image in one.images)
        images |= {image for image in one.images if not image.startswith("../")}
    for image in images:
        found[_kind_of(root / image)] += 1
    ids = [record["id"] for record in raw]
    found["duplicate_id"] = len(ids) - len(set(ids))
    del found["sound"]
    expected = made[name]["findings"]
    assert set(expected) <= Kind.__members__.keys()
    # a sound image that a broken record alone names is written too, but no parsed record shows it
    assert +found == +Counter(expected)


def _kind_of(path: Path) -> str:
    if not path.exists():
        return "missing"
    content = path.read_bytes()
    try:
        decode_image(content)
    except DataError as error:
        return {"the file is": "empty_file", "damaged or ": "damaged"}.get(str(error)[:11], "too_large")
    if content.startswith(b"GIF"):
        return "wrong_extension"
    if content.startswith(b"\x89PNG"):
        return "deep"
    return "cmyk" if b"Adobe" in content[:100] else "sound"


def test_turns_and_images_are_those_of_the_sources(out: Path) -> None:
    path, _ = files_of(out, "instruct")
    raw = json.loads(path.read_text())
    texts = [record for record in raw if "image" not in record]
    assert len(texts) == round(40_688 * SCALE)
    assert all("model" in record for record in texts)
    folders = Counter("/".join(record["image"].split("/")[:2]) for record in raw if "image" in record)
    expected = {"coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images"}
    assert expected | {"vg/VG_100K", "vg/VG_100K_2"} <= folders.keys()
    coco = Counter(record["image"] for record in raw if record.get("image", "").startswith("coco"))
    assert len(coco) < 0.4 * coco.total()  # shared among records
    assert max(len(record["conversations"]) for record in raw) > 20


def test_captions_ask_before_or_behind_the_image(out: Path) -> None:
    path, _ = files_of(out, "pretrain")
    with path.open("rb") as file:
        questions = [one.turns[0].question for one in iter_records(file, path) if isinstance(one, Sample)]
    assert 0.3 < sum(question.startswith("<image>\n") for question in questions) / len(questions) < 0.7


def test_it_is_the_same_again_and_links_hold_the_same_pictures(
    out: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    again = run(tmp_path, "--what", "pretrain", "--link")
    assert again == {"pretrain": made["pretrain"]}
    (path, root), (linked_path, linked_root) = files_of(out, "pretrain"), files_of(tmp_path, "pretrain")
    assert path.read_bytes() == linked_path.read_bytes()
    one = next(root.glob("*/*.jpg")).relative_to(root)
    assert decode_image((root / one).read_bytes()) == decode_image((linked_root / one).read_bytes())
    assert len({file.stat().st_ino for file in linked_root.glob("*/*")}) < 250
