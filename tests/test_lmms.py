"""The parts of the lmms-eval adapter that do without lmms-eval."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from factories_data import paths_below
from factories_evaluation import CLASSES, NUM_ITEMS, make_task
from factories_lmms import RUN, make_run

from morebench.config.compose import ROOT, compose_config
from morebench.config.schema import Profile
from morebench.errors import EXIT_USER, ConfigError, DataError, MorebenchError
from morebench.evaluation.items import OpenTask
from morebench.evaluation.records import open_task
from morebench.evaluation.scoring import score_items
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.lmms.__main__ import TASKS
from morebench.lmms.answering import Asked, AskedRun
from morebench.lmms.docs import Docs, Metrics, open_suite_task, task_keys, told
from morebench.lmms.requests import answer_limit, check_generation, place_images

SUITE = "llava_more_13"


class FunctionNames(yaml.SafeLoader):
    """Reads what lmms-eval's own loader would import as its name."""


FunctionNames.add_constructor("!function", lambda _, node: node.value)


def task_files() -> dict[str, dict[str, Any]]:
    return {path.stem: yaml.load(path.read_text(), FunctionNames) for path in TASKS.glob("*.yaml")}


@pytest.mark.parametrize(
    ("text", "num_images", "profile", "placed", "shown"),
    [
        ("Red?", 1, Profile.paper, "<image>\nRed?", 1),
        ("Red?", 8, Profile.paper, "<image>\nRed?", 1),
        ("Red?", 3, Profile.lmms_eval_0_7_3, "<image> <image> <image>\nRed?", 3),
        ("Red?", 0, Profile.lmms_eval_0_7_3, "Red?", 0),
        ("Like <image 1>?", 1, Profile.paper, "<image>\nLike <image 1>?", 1),
        ("Is <image> like <image>?", 3, Profile.lmms_eval_0_7_3, "Is <image> like <image>?", 2),
    ],
)
def test_image_tokens_go_where_the_harness_of_the_profile_puts_them(
    text: str, num_images: int, profile: Profile, placed: str, shown: int
) -> None:
    assert place_images(text, num_images, profile, "t 0") == (placed, shown)


def test_an_image_token_without_an_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"t 3: its text has 2 <image>, but 1 image\(s\)\."):
        place_images("<image> or <image>?", 1, Profile.paper, "t 3")


GREEDY: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1}
GREEDY |= {"do_sample": False, "until": ["ASSISTANT:"], "image_aspect_ratio": "original"}


def test_greedy_generation_is_taken_as_it_comes() -> None:
    check_generation([("a", GREEDY), ("b", {"until": ["\n\n"], "do_sample": False}), ("c", {})])
    assert [answer_limit(each) for each in (GREEDY, {}, {"max_new_tokens": None})] == [16, 1024, 1024]


def test_all_that_is_not_greedy_is_refused_at_once() -> None:
    sampled = {"temperature": 0.2, "do_sample": True, "num_beams": 3, "max_new_tokens": 0}
    with pytest.raises(ConfigError) as caught:
        check_generation([("a", GREEDY), ("b", sampled), ("b", sampled), ("c", {"seed": 1})])
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0].split(" must")[0] for line in lines[:-1]] == [
        "b: temperature",
        "b: do_sample",
        "b: num_beams",
        "b: max_new_tokens",
        "c: seed",
    ]
    assert "found 0.2" in lines[0]
    assert "There are: max_new_tokens, do_sample" in lines[4]
    assert "--gen_kwargs do_sample=False,temperature=0" in lines[-1]


class FinishedRun(NamedTuple):
    root: Path
    tasks: list[OpenTask]
    predictions: list[str]  # of the evaluate step: vqa's, pope's, mc's

    def overrides(self, **more: Any) -> dict[str, Any]:
        return {"runs": str(self.root / "runs"), "paths.root": str(self.root), "trainer": "cpu"} | more


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("lmms")
    config, _ = make_run(root)
    tasks = [open_task(name, task, config.paths, Profile.paper) for name, task in config.suite.tasks.items()]
    return FinishedRun(root, tasks, [text for task in tasks for text in predictions(root / "first", task)])


def predictions(evaluated: Path, task: OpenTask) -> list[str]:
    lines = (evaluated / "predictions" / f"{task.name}.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.fixture(scope="module")
def asked_run(finished: FinishedRun) -> AskedRun:
    return AskedRun(RUN, "cpu", "8", finished.overrides())


def asked(text: str, visuals: Any, doc_id: int, task: str, **generation: Any) -> Asked:
    return Asked(text, {"max_new_tokens": 5, **generation}, visuals, doc_id, task, "test")


def test_answers_are_those_of_the_evaluate_step_in_the_order_of_the_requests(
    finished: FinishedRun, asked_run: AskedRun
) -> None:
    docs = {task.name: {"test": Docs(task.items)} for task in finished.tasks}
    questions = [
        asked(doc.item.question.text, None, doc.at, task, until=["e"])  # stop strings are not applied
        for task, splits in docs.items()
        for doc in splits["test"]
    ]
    order = np.random.default_rng(0).permutation(len(questions))
    pairs = asked_run.answer([questions[i] for i in order], docs)
    assert [answer.text for _, answer in pairs] == [finished.predictions[i] for i in order]


def test_images_and_texts_of_other_tasks_become_the_same_requests(
    finished: FinishedRun, asked_run: AskedRun
) -> None:
    task = finished.tasks[0]
    rows = [{"image": item.images[0].load()} for item in task.items]
    questions = [
        asked(item.question.text.removeprefix("<image>\n"), lambda row: [row["image"]], at, "other")
        for at, item in enumerate(task.items)
    ]
    pairs = asked_run.answer(questions, {"other": {"test": rows}})
    assert [answer.text for _, answer in pairs] == finished.predictions[: len(rows)]
    keys = {request.images[0].key for request, _ in pairs}
    assert len(keys) == len({item.images[0].key for item in task.items})  # of the content


def test_every_request_has_its_own_limit(finished: FinishedRun, asked_run: AskedRun) -> None:
    limits = [1, 4, 2, 3]
    questions = [
        asked("Red?", lambda row: [], at, "other", max_new_tokens=limit) for at, limit in enumerate(limits)
    ]
    pairs = asked_run.answer(questions, {"other": {"test": [{}] * 4}})
    assert [(answer.num_tokens, answer.ended) for _, answer in pairs] == [(limit, False) for limit in limits]


def test_images_that_the_llm_does_not_see_are_counted(
    finished: FinishedRun, asked_run: AskedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    image = finished.tasks[0].items[0].images[0].load()
    visuals = [lambda row: [image] * 8, lambda row: [image], lambda row: None]
    questions = [asked("Red?", visual, 0, "video") for visual in visuals]
    pairs = asked_run.answer(questions, {"video": {"test": [{}]}})
    assert [len(request.images) for request, _ in pairs] == [1, 1, 0]
    assert (
        "WARNING: video: 1 questions show their first images only: profile paper" in capsys.readouterr().err
    )
    with pytest.raises(DataError, match=r"video 0: expected images, found str\. morebench sees images only"):
        asked_run.answer([asked("Red?", lambda row: ["a.mp4"], 0, "video")], {"video": {"test": [{}]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": None}, "expected --model_args run=ID"),
        ({"run": "toy-finetune-2"}, f"neither a run in .*Near: {RUN}"),
        ({"run": "unfinished"}, "Only a finished run"),
        ({"batch_size": "auto"}, "--batch_size must be a number from 1 on, found auto"),
        ({"device": "gpu"}, "--device gpu: expected cuda, cuda:0, .* or cpu"),
        ({"device": "cuda:7"}, "--device cuda:7: torch finds"),
        ({"profile": "pepar"}, "stage.evaluate.profile=pepar"),
        ({"llm": "phi4"}, "llm=phi4: the run has it fixed. Free: suite, stage.evaluate"),
        ({"trianer.threads": 2}, "trianer.threads=2"),
    ],
)
def test_mistakes_in_the_model_arguments_are_named(
    finished: FinishedRun, change: dict[str, Any], message: str
) -> None:
    unfinished = finished.root / "runs" / "unfinished"
    if not unfinished.is_dir():
        shutil.copytree(finished.root / "runs" / RUN, unfinished, ignore=shutil.ignore_patterns("DONE"))
    own = {"run": RUN, "device": "cpu", "batch_size": 8}
    own |= {key: value for key, value in change.items() if key in own}
    overrides = finished.overrides(**{key: value for key, value in change.items() if key not in own})
    with pytest.raises(MorebenchError, match=message) as caught:
        AskedRun(own["run"], own["device"], own["batch_size"], overrides)
    assert caught.value.exit_code == EXIT_USER


@pytest.fixture(scope="module", params=CLASSES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenTask:
    root = tmp_path_factory.mktemp("toy")
    (root / "data" / "toy" / "images").mkdir(parents=True)
    task = make_task(root / "data" / "toy", request.param, np.random.default_rng(0))
    return open_task(request.param, task, paths_below(root), Profile.paper)


def test_metrics_are_those_of_the_evaluate_step_in_whatever_order_the_answers_come(opened: OpenTask) -> None:
    metrics = Metrics(opened, Profile.paper)
    texts = ["Yes", "yes ", "A", "B.", "no"] * (NUM_ITEMS // 5)
    pairs = zip(texts, (item.record for item in opened.items), strict=True)
    scored = score_items(opened.benchmark, pairs, Profile.paper)
    expected = opened.benchmark.aggregate(scored, Profile.paper)
    answers = list(enumerate(texts))
    assert metrics.of(answers) == metrics.of(answers[::-1]) == expected
    assert metrics.names == list(expected)
    assert metrics.of(answers[:3]) != expected  # not what it remembers
    assert max(expected.values()) > 0


def test_what_is_settled_among_all_answers_follows_the_order_of_the_records(opened: OpenTask) -> None:
    """MMMU guesses where it reads no letter; processes of lmms-eval hand their answers over one by one."""
    records = [
        {"id": f"v_Art_{at}", "question": "?", "question_type": "multiple-choice", "options": list("wxyz")}
        | {"answer": "ABCD"[at % 4]}
        for at in range(NUM_ITEMS)
    ]
    items = [replace(item, record=record) for item, record in zip(opened.items, records, strict=True)]
    metrics = Metrics(replace(opened, benchmark=MMMU(), items=items), Profile.paper)
    answers = [(at, "?") for at in range(NUM_ITEMS)]
    expected = metrics.of(answers)
    assert metrics.of(answers[:1]) != expected
    for world_size in range(2, 8):
        dealt = [answer for rank in range(world_size) for answer in answers[rank::world_size]]
        assert metrics.of(dealt) == expected


def test_docs_are_records_that_know_their_item(opened: OpenTask) -> None:
    docs = Docs(opened.items)
    assert len(docs) == NUM_ITEMS
    assert [(doc.at, doc.item) for doc in docs] == list(enumerate(opened.items))
    assert docs[7] == dict(opened.items[7].record)
    assert docs[7].item is opened.items[7]
    assert set(docs.features) == set(opened.items[0].record)


def test_every_task_of_the_suite_has_its_file_and_its_place_in_the_group() -> None:
    files = task_files()
    group = files.pop(f"{SUITE}_paper")
    names = list(compose_config([f"suite={SUITE}"]).config.suite.tasks)
    assert group == {"group": f"{SUITE}_paper", "task": [f"{name}_paper" for name in names]}
    assert files == {
        f"{name}_paper": {
            "task": f"{name}_paper",
            "class": "morebench.lmms.task.SuiteTask",
            "suite": SUITE,
            "of_suite": name,
            "profile": "paper",
        }
        for name in names
    }


@pytest.mark.parametrize(
    ("suite", "name", "profile", "message"),
    [
        ("llava_more_31", "gqa", "paper", "llava_more_13"),
        (SUITE, "gqq", "paper", "no task gqq. There are: gqa, scienceqa_img"),
        (SUITE, "gqa", "pepar", "must be one of paper, lmms_eval_0_7_3, found 'pepar'"),
    ],
)
def test_a_misspelt_task_file_is_named(suite: str, name: str, profile: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_suite_task(suite, name, profile)


def test_a_task_file_without_a_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task mine: its YAML file has no of_suite, profile\."):
        task_keys({"task": "mine", "suite": "digits"})


def test_mistakes_leave_with_a_sentence_before_lmms_eval_sees_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught, told():
        raise ConfigError("no such run.")
    assert caught.value.code == EXIT_USER
    assert capsys.readouterr().err == "error: no such run.\n"


def test_the_folder_of_tasks_is_printed_without_lmms_eval_and_torch() -> None:
    code = "import sys, runpy; sys.argv = ['lmms']; sys.modules['torch'] = sys.modules['lmms_eval'] = None; "
    code += "runpy.run_module('morebench.lmms', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == (f"{TASKS}\n", 0), run.stderr


def pins(name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", (ROOT / name).read_text(), re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


def test_the_environment_of_lmms_eval_differs_from_ours_in_what_it_demands() -> None:
    ours, theirs = pins("requirements.lock"), pins("requirements-lmms.lock")
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"protobuf", "python-dateutil"}
    assert Path(ROOT / "requirements-lmms.lock").read_text().count("://") == 0
