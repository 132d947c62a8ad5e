"""All 13 columns through everything but a model: true schemas, a hundredth of the rows."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from factories_benchmarks import answer, make_mirrors

from morebench import evaluate
from morebench.config.compose import save_config
from morebench.config.schema import Config, Profile
from morebench.reporting.results import ReportRow, load_result
from morebench.reporting.results import read_lines as lines_of

Configs = Mapping[Profile, Config]
FULL = {"MME-P": 2000.0, "MME-C": 800.0}  # all others: 100
PROFILES = pytest.mark.parametrize("profile", Profile, ids=lambda profile: profile.name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mirrors")


@pytest.fixture(scope="module")
def configs(root: Path) -> Configs:
    return make_mirrors(root)


@pytest.fixture(scope="module")
def mixed(configs: Configs, root: Path) -> dict[Profile, Path]:
    """The study's profile also with other images."""
    folders = {profile: root / profile.name for profile in Profile}
    for profile, folder in folders.items():
        answer(_with_controls(configs[profile], ["shuffled"] if profile is Profile.paper else []), folder)
    return folders


def _with_controls(config: Config, controls: list[str]) -> Config:
    stage = config.stage
    return replace(config, stage=replace(stage, evaluate=replace(stage.evaluate, controls=controls)))


def columns(config: Config, folder: Path) -> dict[str, float]:
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    return {c.label: c.factor * tasks[c.task]["metrics"][c.metric] for c in config.suite.columns}


def items(folder: Path, task: str) -> list[dict[str, Any]]:
    return lines_of(folder / "predictions" / f"{task}.jsonl")


def questions(folder: Path, task: str) -> list[str]:
    return [item["question"] for item in items(folder, task)]


@pytest.mark.parametrize(
    ("profile", "manner", "share"),
    [(Profile.paper, "right", 1.0), (Profile.paper, "wrong", 0.0), (Profile.lmms_eval_0_7_3, "right", 1.0)],
)
def test_the_best_and_the_worst_model(
    configs: Configs, tmp_path: Path, profile: Profile, manner: str, share: float
) -> None:
    config = configs[profile]
    answer(config, tmp_path / "run", manner)
    found = columns(config, tmp_path / "run")
    assert list(found) == [column.label for column in config.suite.columns]
    assert len(found) == 13
    assert found == {label: pytest.approx(share * FULL.get(label, 100.0)) for label in found}


@PROFILES
def test_a_model_that_answers_in_many_ways(
    configs: Configs, mixed: dict[Profile, Path], profile: Profile
) -> None:
    """Every column lies between, has an interval around it, and counts every row."""
    config, folder = configs[profile], mixed[profile]
    save_config(config, folder / "config.yaml")
    (folder / "DONE").write_text("{}")
    row = ReportRow(cell={}, labels={}, seed=0, runs={"evaluate": folder})
    result = load_result(row, config.suite.columns)
    scores = result.scores
    assert result.controls.keys() == ({"shuffled"} if profile is Profile.paper else set())
    assert all(control.keys() == scores.keys() for control in result.controls.values())
    assert [*scores] == [column.label for column in config.suite.columns]
    for column in config.suite.columns:
        score = scores[column.label]
        assert 0 < score.value < FULL.get(column.label, 100.0)
        assert score.low <= score.value <= score.high
        assert score.n == config.suite.tasks[column.task].data.num_rows == len(items(folder, column.task))
    seed = json.loads((folder / "results.json").read_text())["tasks"]["seedbench"]["metrics"]
    kinds = [line["record"]["data_type"] for line in lines_of(folder / "scores" / "seedbench.jsonl")]
    pooled = sum(kinds.count(kind) * seed[f"seed_{kind}"] for kind in ("image", "video"))
    assert math.isclose(seed["seed_all"], pooled / len(kinds))


def test_questions_of_an_image_share_it(mixed: dict[Profile, Path]) -> None:
    folder = mixed[Profile.paper]
    images = {
        task: {item["images_sha256"] for item in items(folder, task)} for task in ("gqa", "pope", "mme")
    }
    assert [len(images["gqa"]), len(images["pope"])] == [4, 5]
    assert 2 * len(images["mme"]) == len(items(folder, "mme"))
    languages = [
        {item["id"]: item["images_sha256"] for item in items(folder, f"mmbench_{language}_dev")}
        for language in ("cn", "en")
    ]
    assert languages[0] == languages[1]


def test_the_profiles_ask_as_their_harness_does(mixed: dict[Profile, Path]) -> None:
    paper, newer = (mixed[profile] for profile in Profile)
    for task in ("gqa", "scienceqa_img", "ai2d", "pope", "mme", "mmbench_cn_dev", "mmbench_en_dev"):
        assert questions(paper, task) == questions(newer, task)
    assert all("Reference OCR token: " in text for text in questions(paper, "textvqa_val"))
    assert not any("Reference OCR token: " in text for text in questions(newer, "textvqa_val"))
    counts = [{text.count("<image>") for text in questions(folder, "seedbench")} for folder in (paper, newer)]
    assert counts == [{1}, {1, 8}]
    assert max(text.count("<image>") for text in questions(paper, "mmmu_val")) >= 3
    assert any(text.startswith("<image>\nnan ") for text in questions(paper, "mmbench_cn_dev"))
    assert not any("nan" in text for text in questions(paper, "mmbench_en_dev"))


def test_schemas_are_the_published_ones(configs: Configs, root: Path) -> None:
    def types(folder: str, name: str) -> dict[str, str]:
        (path,) = (root / "data" / "lmms-lab" / folder).glob(f"{name}-*.parquet")
        schema = pq.read_schema(path)
        assert b"huggingface" in schema.metadata
        return {field.name: str(field.type) for field in schema}

    image = "struct<bytes: binary, path: string>"
    assert types("ai2d", "data/test") == {
        "question": "string",
        "options": "list<element: string>",
        "answer": "string",
        "image": image,
    }
    assert types("ScienceQA", "ScienceQA-IMG/test")["answer"] == "int8"
    assert types("textvqa", "data/validation")["question_id"] == "int32"
    assert types("MMBench", "cn/dev")["index"] == "int64"
    assert types("SEED-Bench", "data/test")["image"] == f"list<element: {image}>"
    assert {types("MMMU", "data/validation")[f"image_{number}"] for number in range(1, 8)} == {image}


@pytest.mark.parametrize("changed", [False, True])
def test_replaying_published_outputs(
    configs: Configs,
    mixed: dict[Profile, Path],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: bool,
) -> None:
    """Our own, written as lmms-eval writes them."""
    folder, num_rows = mixed[Profile.paper], configs[Profile.paper].suite.tasks["gqa"].data.num_rows
    scores = [line["score"] for line in lines_of(folder / "scores" / "gqa.jsonl")]
    metrics = json.loads((folder / "results.json").read_text())["tasks"]["gqa"]["metrics"]
    if changed:
        scores[7] = 1 - scores[7]
        metrics["exact_match"] += 0.01
    samples = [
        {"doc_id": item["index"], "target": item["target"], "filtered_resps": item["prediction"]}
        | {"exact_match": score, "input": item["question"].removeprefix("<image>\n")}
        for item, score in zip(items(folder, "gqa"), scores, strict=True)
    ]
    path = tmp_path / "20260101_samples_gqa.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "20260101_results.json").write_text(json.dumps({"results": {"gqa": metrics}}))
    overrides = [f"paths.data={root / 'data'}", f"paths.cache={root / 'cache'}"]
    overrides.append(f"suite.tasks.gqa.data.num_rows={num_rows}")
    code = evaluate.command([f"outputs={path}", "task=gqa", "profile=paper", *overrides])
    out = capsys.readouterr().out
    assert code == int(changed)
    assert f"{num_rows} published scores of items compared, {int(changed)} differ from ours" in out
    assert ("exact_match" in out, "differs" in out) == (True, changed)
    assert "asked in other words" not in out
