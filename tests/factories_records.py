"""Copies of the ten benchmarks' hub repositories: true schemas, a handful of rows, tiny images."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

from morebench.config.compose import compose_config
from morebench.config.schema import Paths, Suite, Task

Row = dict[str, Any]
TEXT = Value("string")
SIZE = 6  # rows of every split but MMBench's and GQA's images


@cache
def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image(number: int) -> Row:
    return {"bytes": png(number), "path": f"{number}.png"}


def texts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, TEXT)


def _gqa(row: int) -> Row:
    return {
        "id": f"{row}",
        "imageId": f"n{row % 2}",
        "question": "Is it?",
        "answer": "yes",
        "isBalanced": True,
    }


def _scienceqa(row: int) -> Row:
    return {"image": image(row), "question": "?", "choices": ["a", "b"], "answer": row % 2, "hint": "h" * row}


def _textvqa(row: int) -> Row:
    record: Row = {
        "image_id": "x",
        "question_id": 34_602 + row,
        "question": "What?",
        "image": image(row // 2),
    }
    return record | {"answers": ["stop"] * 10, "ocr_tokens": ["STOP"] * row}


def _ai2d(row: int) -> Row:
    return {"question": "?", "options": list("abcd"), "answer": str(row % 4), "image": image(row)}


def _pope(row: int) -> Row:
    category = ("random", "popular", "adversarial")[row % 3]
    record: Row = {"id": f"{row}", "question_id": f"{row // 3}", "question": "Is it? ", "answer": "no"}
    return record | {"image_source": "COCO", "image": image(0), "category": category}


def _mme(row: int) -> Row:
    name, question = f"count/{row // 2:04}.png", "Is it? Please answer yes or no."
    record: Row = {"question_id": name, "image": image(row // 2), "question": question}
    return record | {"answer": ("Yes", "No")[row % 2], "category": "count"}


def _mmbench(row: int) -> Row:
    rotation, options = row % 2, ["yes", "no"]
    record: Row = {
        "index": row // 2 + rotation * 1_000_000,
        "question": "?",
        "hint": "nan",
        "answer": "AB"[rotation],
    }
    record |= {"A": options[rotation], "B": options[1 - rotation], "C": "nan", "D": "nan", "category": "c"}
    return record | {
        "image": image(row // 2),
        "source": "s",
        "L2-category": "l",
        "comment": "nan",
        "split": "dev",
    }


def _seedbench(row: int) -> Row:
    is_video = row % 2 == 1
    record: Row = {f"choice_{letter}": letter for letter in "abcd"}
    record |= {"question": "?", "answer": "C", "data_type": "video" if is_video else "image"}
    return record | {"question_id": f"q{row}", "image": [image(row + n) for n in range(8 if is_video else 1)]}


def _mmmu(row: int) -> Row:
    marks = "<image 1> or <image 3>" if row % 2 else "<image 1>"
    record: Row = {"id": f"validation_Art_{row}", "question": f"Which, {marks}?", "options": "['a', 'b']"}
    record |= {"answer": "B", "question_type": "multiple-choice", "subfield": "x"}
    if row == SIZE - 1:
        record |= {"question_type": "open", "options": "[]", "answer": "7"}
    images = {
        f"image_{n}": image(10 * row + n) if n == 1 or (row % 2 and n == 3) else None for n in range(1, 8)
    }
    return record | images


_GQA = texts("id", "imageId", "question", "answer") | {"isBalanced": Value("bool")}
_SCIENCEQA = {
    "image": Image(),
    "question": TEXT,
    "choices": List(TEXT),
    "answer": Value("int8"),
    "hint": TEXT,
}
_TEXTVQA = texts("image_id", "question") | {"question_id": Value("int32"), "image": Image()}
_TEXTVQA |= {"answers": List(TEXT), "ocr_tokens": List(TEXT)}
_AI2D = {"question": TEXT, "options": List(TEXT), "answer": TEXT, "image": Image()}
_POPE = texts("id", "question_id", "question", "answer", "image_source") | {
    "image": Image(),
    "category": TEXT,
}
_MME = texts("question_id", "question", "answer", "category") | {"image": Image()}
_MMBENCH = {"index": Value("int64"), "image": Image()} | texts(
    "question", "hint", "answer", *"ABCD", "category"
)
_MMBENCH |= texts("source", "L2-category", "comment", "split")
_SEEDBENCH = texts("question", *(f"choice_{x}" for x in "abcd"), "answer", "data_type", "question_id")
_SEEDBENCH |= {"image": List(Image())}
_MMMU = texts("id", "question", "options", "answer", "question_type", "subfield")
_MMMU |= {f"image_{n}": Image() for n in range(1, 8)}

Make = Callable[[int], Row]
# (folder, config, split) -> what its rows are like
TABLES: dict[tuple[str, str, str], tuple[Make, dict[str, Any], int]] = {
    ("GQA", "testdev_balanced_instructions", "testdev"): (_gqa, _GQA, SIZE),
    ("GQA", "testdev_balanced_images", "testdev"): (
        lambda row: {"id": f"n{1 - row}", "image": image(100 + row)},
        {"id": TEXT, "image": Image()},
        2,
    ),
    ("ScienceQA", "ScienceQA-IMG", "test"): (_scienceqa, _SCIENCEQA, SIZE),
    ("textvqa", "default", "validation"): (_textvqa, _TEXTVQA, SIZE),
    ("ai2d", "default", "test"): (_ai2d, _AI2D, SIZE),
    ("POPE", "default", "test"): (_pope, _POPE, SIZE),
    ("POPE", "Full", "random"): (_pope, _POPE, SIZE),
    ("MME", "default", "test"): (_mme, _MME, SIZE),
    ("MMBench", "cn", "dev"): (_mmbench, _MMBENCH, SIZE),
    ("MMBench", "en", "dev"): (_mmbench, _MMBENCH, SIZE),
    ("SEED-Bench", "default", "test"): (_seedbench, _SEEDBENCH, SIZE),
    ("MMMU", "default", "validation"): (_mmmu, _MMMU, SIZE),
    ("MMMU", "default", "dev"): (_mmmu, _MMMU, SIZE),
}


@cache
def suite() -> Suite:
    """llava_more_13, whose tasks expect SIZE rows."""
    found = compose_config(["suite=llava_more_13"]).config.suite
    tasks = {
        name: replace(task, data=replace(task.data, num_rows=SIZE)) for name, task in found.tasks.items()
    }
    return replace(found, tasks=tasks)


def task(name: str, **data: Any) -> Task:
    found = suite().tasks[name]
    return replace(found, data=replace(found.data, **data))


def paths_in(root: Path) -> Paths:
    found = compose_config([]).config.paths
    return replace(found, data=str(root / "data"), cache=str(root / "cache"))


def table_of(key: tuple[str, str, str], change: Callable[[list[Row]], Any] | None = None) -> pa.Table:
    make, features, size = TABLES[key]
    rows = [make(row) for row in range(size)]
    if change is not None:
        change(rows)
    schema = Features(features).arrow_schema
    return pa.Table.from_pylist([{name: row.get(name) for name in features} for row in rows], schema=schema)


def write_shards(table: pa.Table, folder: Path, split: str, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(table) // shards) or 1
    for number in range(shards):
        name = f"{split}-{number:05}-of-{shards:05}.parquet"
        pq.write_table(table.slice(number * size, size), folder / name, row_group_size=2)


def write_mirror(
    organisation: Path,
    only: str | None = None,
    readme: bool = True,
    changes: Mapping[tuple[str, str, str], Callable[[list[Row]], Any]] | None = None,
) -> None:
    """`organisation`/<data set>. Two shards a split; `readme`: its `configs:` say where they are."""
    stated: dict[Path, dict[str, list[Row]]] = {}
    for key in TABLES:
        name, config, split = key
        if only in (None, name):
            folder = organisation / name
            place = config if readme or config != "default" else "data"
            write_shards(table_of(key, (changes or {}).get(key)), folder / place, split, shards=2)
            files = {"split": split, "path": f"{place}/{split}-*"}
            stated.setdefault(folder, {}).setdefault(config, []).append(files)
    for folder, configs in stated.items() if readme else ():
        content = [{"config_name": name, "data_files": files} for name, files in configs.items()]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': content})}---\nText.\n")
