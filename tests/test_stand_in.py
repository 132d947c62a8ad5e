"""The stand-in of the published data: what the loader reads, with what it says is broken and nothing else."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories_data import paths_below

from morebench.config.compose import ROOT, compose_config
from morebench.data.checked import FINDINGS, QUARANTINE
from morebench.data.checking.check import check_data
from morebench.data.images import decode_image
from morebench.data.records import Parsed, iter_records

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


@pytest.mark.parametrize(("name", "group"), [("pretrain", "pretrain_data"), ("instruct", "finetune_data")])
def test_a_check_finds_what_is_broken_and_nothing_else(
    out: Path, made: dict[str, Any], name: str, group: str, tmp_path: Path
) -> None:
    data = getattr(compose_config([]).config, group)
    paths = replace(paths_below(tmp_path), data=str(out))
    checked = check_data(data, paths, 0, lambda text: None).data
    assert checked.manifest.num_records == made[name]["records"]
    of_kind = defaultdict(set)
    for file in (QUARANTINE, FINDINGS):
        for line in (checked.folder / file).open():
            entry = json.loads(line)
            is_images = entry["image"] is not None and entry["kind"] != "outside"
            of_kind[entry["kind"]].add(entry["image"] if is_images else entry["record"])
    found = {kind: len(members) for kind, members in of_kind.items()}
    expected = dict(made[name]["findings"])
    # the stand-in counts every later record of an id, the check those that it keeps
    lost = expected.pop("duplicate_id") - found.pop("duplicate_id", 0)
    assert 0 <= lost <= checked.manifest.num_quarantined
    assert found == expected


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
        parsed = [one for one in iter_records(file, path) if isinstance(one, Parsed)]
    questions = [one.sample.turns[0].question for one in parsed]
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
