"""Record sets in the schemas, counts and folders of the ten benchmarks, none of the content.

    python benchmarks/suite_records.py OUT [--scale 0.01]
    python -m morebench.evaluate run=ID suite=llava_more_13 paths.data=OUT

Each folder is what a copy of the benchmark's hub repository looks like: parquet files in shards, and a
README.md whose `configs:` say which files are which config and split. Configs and splits that the suite does
not ask for are there too, a few rows each. Images are of some 16 x 16 pixels and shared as in the original:
398 of GQA, 500 of POPE, one for the two questions of MME and for all rotations of MMBench in both languages.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features
from suite_questions import Row, features_of, rows_of

ROW_GROUP = 100  # rows, as the hub writes tables with images
SHARD = 5000  # rows


@dataclass(frozen=True)
class Table:
    """One config and split. `make`: a name of `suite_questions.rows_of`."""

    folder: str
    config: str
    split: str
    make: str
    unused: bool = False  # no task of the suite reads it


TABLES = (
    Table("GQA", "testdev_balanced_instructions", "testdev", "gqa"),
    Table("GQA", "testdev_balanced_images", "testdev", "gqa_images"),
    Table("ScienceQA", "ScienceQA-IMG", "test", "scienceqa"),
    Table("ScienceQA", "ScienceQA-FULL", "test", "scienceqa", unused=True),
    Table("textvqa", "default", "validation", "textvqa"),
    Table("textvqa", "default", "test", "textvqa", unused=True),
    Table("ai2d", "default", "test", "ai2d"),
    Table("POPE", "default", "test", "pope"),
    Table("POPE", "Full", "adversarial", "pope", unused=True),
    Table("MME", "default", "test", "mme"),
    Table("MMBench", "cn", "dev", "mmbench_cn"),
    Table("MMBench", "en", "dev", "mmbench_en"),
    Table("MMBench", "en", "test", "mmbench_en", unused=True),
    Table("SEED-Bench", "default", "test", "seedbench"),
    Table("MMMU", "default", "validation", "mmmu"),
    Table("MMMU", "default", "dev", "mmmu", unused=True),
)
TASKS = {
    "gqa": "gqa",
    "scienceqa": "scienceqa_img",
    "textvqa": "textvqa_val",
    "ai2d": "ai2d",
    "pope": "pope",
    "mme": "mme",
    "mmbench_cn": "mmbench_cn_dev",
    "mmbench_en": "mmbench_en_dev",
    "seedbench": "seedbench",
    "mmmu": "mmmu_val",
}
"""Table -> task of the suite llava_more_13."""


def write_mirrors(data: Path, scale: float = 1.0, organisation: str = "lmms-lab") -> dict[str, int]:
    """Fills `data`/`organisation`/<data set>. Returns the number of rows by task."""
    counts: dict[str, int] = {}
    configs: dict[Path, dict[str, list[dict[str, str]]]] = {}
    for table in TABLES:
        folder = data / organisation / table.folder
        rows = (
            list(rows_of(table.make, scale))
            if not table.unused
            else list(islice(rows_of(table.make, 0.0), 4))
        )
        pattern = f"{'data' if table.config == 'default' else table.config}/{table.split}"
        _write(folder / pattern, rows, features_of(table.make))
        files = configs.setdefault(folder, {}).setdefault(table.config, [])
        files.append({"split": table.split, "path": f"{pattern}-*"})
        if not table.unused and table.make in TASKS:
            counts[TASKS[table.make]] = len(rows)
    for folder, found in configs.items():
        content = {"configs": [{"config_name": name, "data_files": files} for name, files in found.items()]}
        (folder / "README.md").write_text(
            f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n\nA stand-in.\n"
        )
    return counts


def _write(pattern: Path, rows: list[Row], features: Features) -> None:
    """Shards named as `datasets` names them when it pushes to the hub."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    shards = range(0, len(rows), SHARD)
    for number, start in enumerate(shards):
        path = pattern.parent / f"{pattern.name}-{number:05}-of-{len(shards):05}.parquet"
        table = pa.Table.from_pylist(rows[start : start + SHARD], schema=features.arrow_schema)
        pq.write_table(table, path, row_group_size=ROW_GROUP)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of every count")
    chosen = parser.parse_args()
    print(json.dumps(write_mirrors(chosen.out, chosen.scale), indent=1))


if __name__ == "__main__":
    main()
