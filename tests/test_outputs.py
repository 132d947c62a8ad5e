"""Published outputs of other harnesses, in their own layouts, replayed through our scorers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.items import Item, OpenTask, TaskSource
from morebench.evaluation.outputs import MAX_BYTES, read_outputs
from morebench.evaluation.replay import Replayed, replay_outputs
from morebench.evaluation.tasks.ai2d import AI2D
from morebench.evaluation.tasks.benchmark import Benchmark, Record
from morebench.evaluation.tasks.gqa import GQA
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.evaluation.tasks.pope import POPE
from morebench.evaluation.tasks.seedbench import SEEDBench
from morebench.evaluation.tasks.textvqa import TextVQA

PAPER, NEWER = Profile.paper, Profile.lmms_eval_0_7_3


def task_of(name: str, benchmark: Benchmark, records: Sequence[Record], profile: Profile = PAPER) -> OpenTask:
    items = [
        Item(at, str(record.get("id", at)), record, benchmark.question(record, profile), ())
        for at, record in enumerate(records)
    ]
    return OpenTask(name, benchmark, items, 16, TaskSource("here", "", None, None, ""))


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def gqa() -> OpenTask:
    return task_of(
        "gqa", GQA(), [{"id": f"q{i}", "question": f"What is {i}?", "answer": "red"} for i in range(4)]
    )


def metric(found: Replayed, name: str) -> tuple[float, float | None]:
    (own,) = [metric for metric in found.metrics if metric.name == name]
    return own.ours, own.published


GQA_ANSWERS = ("red", "Red.", "blue", "")


def logs_of_0_1(score: Callable[[int], float]) -> dict[str, Any]:
    """One JSON document; answers in two lists, documents whole."""
    return {
        "args": {"model": "llava"},
        "model_configs": {"task": "gqa"},
        "logs": [
            {
                "doc_id": i,
                "target": "red",
                "doc": {"id": f"q{i}", "question": f"What is {i}?"},
                "arguments": [
                    [f"What is {i}?\nAnswer the question using a single word or phrase.", i, "gqa"]
                ],
                "resps": [[answer]],
                "filtered_resps": [answer],
                "exact_match": score(i),
            }
            for i, answer in enumerate(GQA_ANSWERS)
        ],
    }


def test_logs_of_lmms_eval_0_1(tmp_path: Path) -> None:
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(logs_of_0_1(lambda i: float(i < 2)), indent=4))
    results = {"results": {"gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = replay_outputs(path, gqa(), PAPER)
    assert found.is_same
    assert (found.num_items, found.num_scores, found.other_prompts) == (4, 4, ())
    assert metric(found, "exact_match") == (0.5, 0.5)


def test_an_item_and_a_metric_that_differ_are_named(tmp_path: Path) -> None:
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(logs_of_0_1(lambda i: float(i == 0))))
    (tmp_path / "results.json").write_text(json.dumps({"gqa": {"exact_match": 0.25, "bleu": 1}}))
    found = replay_outputs(path, gqa(), PAPER)
    assert not found.is_same
    assert [line.split(";")[0] for line in found.differences] == ["q1: 0 there, 1 here"]
    assert metric(found, "exact_match") == (0.5, 0.25)
    assert found.unknown_metrics == ("bleu",)


def test_a_metric_alone_can_differ(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"id": f"q{i}", "prediction": text} for i, text in enumerate(GQA_ANSWERS)]
    )
    (tmp_path / "results.json").write_text(json.dumps({"gqa": {"exact_match": 0.5 + 1e-6}}))
    assert not replay_outputs(path, gqa(), PAPER).is_same


@pytest.mark.parametrize("wrapped", [True, False])
def test_samples_of_later_versions(tmp_path: Path, wrapped: bool) -> None:
    """In lists until 0.6, plain since 0.7. `resps` only where a filter took something away."""
    records = [{"question": "Which?", "options": ["hard", "soft"], "answer": "1"} for _ in range(3)]
    task = task_of("ai2d", AI2D(), records, NEWER)

    def wrap(text: str) -> Any:
        return [text] if wrapped else text

    lines = [
        {"doc_id": 2, "target": "B", "filtered_resps": wrap("A"), "exact_match": 0.0},
        {"doc_id": 0, "target": "B", "filtered_resps": wrap("B"), "exact_match": 1.0},
        {"doc_id": 1, "target": "B", "filtered_resps": wrap("B"), "exact_match": 1.0}
        | {"resps": [wrap("B. soft")], "input": "Which?\nA. hard\nB. soft\nSay a letter."},
    ]
    path = write(tmp_path / "20260101_samples_ai2d.jsonl", lines)
    results = {"results": {"ai2d": {"exact_match,flexible-extract": 2 / 3}}}
    (tmp_path / "20260101_results.json").write_text(json.dumps(results))
    found = replay_outputs(path, task, NEWER)
    assert found.is_same
    assert metric(found, "exact_match") == (2 / 3, 2 / 3)
    assert found.other_prompts == ("1",)
    assert not replay_outputs(path, task, PAPER).is_same  # 'B. soft' was nothing then


def test_scores_that_are_objects(tmp_path: Path) -> None:
    pope = task_of("pope", POPE(), [{"question": "A dog?", "answer": answer} for answer in ("yes", "no")])
    entry = {"question_id": "1", "score": 1.0, "prediction": "yes", "ground_truth": "yes"}
    lines = [
        {"doc_id": 0, "filtered_resps": ["Yes"], "pope_accuracy": entry, "pope_f1_score": entry},
        {"doc_id": 1, "filtered_resps": ["Yes"], "pope_accuracy": entry | {"score": 0.0}},
    ]
    path = write(tmp_path / "1_samples_pope.jsonl", lines)
    published = {"pope_accuracy,none": 0.5, "pope_f1_score,none": 2 / 3, "pope_yes_ratio,none": 0.5}
    (tmp_path / "1_results.json").write_text(json.dumps({"results": {"pope": published}}))
    found = replay_outputs(path, pope, PAPER)
    assert (found.is_same, found.num_scores, found.unknown_metrics) == (True, 2, ())
    assert metric(found, "f1") == (2 / 3, 2 / 3)

    mme = task_of(
        "mme",
        MME(),
        [
            {"question_id": "count/0.png", "question": "Two dogs?", "answer": answer, "category": "count"}
            for answer in ("Yes", "No")
        ],
    )
    lines = [
        {"doc_id": i, "target": target, "filtered_resps": ["yes"], "mme_percetion_score": {"score": 1.0 - i}}
        for i, target in enumerate(("Yes", "No"))
    ]
    path = write(tmp_path / "2_samples_mme.jsonl", lines)
    (tmp_path / "2_results.json").write_text(json.dumps({"mme": {"mme_percetion_score,none": 50.0}}))
    found = replay_outputs(path, mme, PAPER)
    assert (found.is_same, found.unknown_metrics) == (True, ())


def test_letters_of_seed_are_compared_as_in_the_profile(tmp_path: Path) -> None:
    record = {f"choice_{letter}": letter for letter in "abcd"} | {"question": "Which?", "answer": "B"}
    task = task_of("seedbench", SEEDBench(), [record | {"data_type": "image"}])
    lines = [{"doc_id": 0, "filtered_resps": "b", "seed_all": {"pred": "b", "answer": "B"}}]
    path = write(tmp_path / "seed.jsonl", lines)
    for profile, score in ((PAPER, 0.0), (NEWER, 1.0)):
        found = replay_outputs(path, task, profile)
        assert (found.is_same, found.num_scores, metric(found, "seed_all")[0]) == (True, 1, score)


@pytest.mark.parametrize("nested", [True, False])
def test_guesses_of_mmmu_are_taken_over(tmp_path: Path, nested: bool) -> None:
    """Where the draw fell otherwise, the aggregate is still theirs."""
    choice = {"question": "<image 1> Which?", "options": "['hard', 'soft']", "answer": "A"}
    records = [
        choice | {"id": f"validation_Art_{i}", "question_type": "multiple-choice"} for i in range(4)
    ] + [{"id": "validation_Math_5", "question": "<image 1>", "options": "[]", "answer": "8.4"}]
    records[4]["question_type"] = "open"
    task = task_of("mmmu_val", MMMU(), records)
    parsed: list[Any] = ["A", "B", "A", "B", [8.4]]
    lines = [
        {
            "doc_id": i,
            "filtered_resps": [text],
            "mmmu_acc": {
                "answer": record["answer"],
                "question_type": record["question_type"],
                "parsed_pred": [parsed[i]] if nested else parsed[i],
            },
        }
        for i, (record, text) in enumerate(zip(records, ("A", "B", "?!", "?!", "8.4"), strict=True))
    ]
    path = write(tmp_path / "m.jsonl", lines)
    (tmp_path / "results.json").write_text(json.dumps({"mmmu_val": {"mmmu_acc": 0.6}}))
    found = replay_outputs(path, task, PAPER)
    assert (found.is_same, found.num_scores, found.num_guesses) == (True, 5, 2)
    assert metric(found, "mmmu_acc") == (0.6, 0.6)
    lines[1]["mmmu_acc"]["parsed_pred"] = "A"
    assert not replay_outputs(write(path, lines), task, PAPER).is_same


def test_rows_of_mmbench_have_no_score_of_their_own(tmp_path: Path) -> None:
    options = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    record = {"index": 7, "question": "Which?", "hint": "nan", "answer": "A", "category": "x"} | options
    task = task_of("mmbench_en_dev", MMBench("en"), [record, record | {"index": 1_000_007, "answer": "B"}])
    lines = [
        {"doc_id": i, "filtered_resps": [letter], "gpt_eval_score": {"index": i, "prediction": letter}}
        for i, letter in enumerate("AB")
    ]
    path = write(tmp_path / "m.jsonl", lines)
    (tmp_path / "results.json").write_text(json.dumps({"mmbench_en_dev": {"gpt_eval_score,none": 100}}))
    found = replay_outputs(path, task, PAPER)
    assert (found.is_same, found.num_scores) == (True, 0)


def test_answers_files_of_llava(tmp_path: Path) -> None:
    """An id of several questions about one image; the prompt tells them apart."""
    records = [
        {"question_id": 34_602 + i, "image_id": f"im{i // 2}", "question": f"what is {word}?"}
        | {"answers": [word] * 10, "ocr_tokens": []}
        for i, word in enumerate(("red", "red? or blue", "blue"))
    ]
    task = task_of("textvqa_val", TextVQA(), records)
    lines = [
        {
            "question_id": f"im{i // 2}",
            "prompt": f"What is {word}?\nReference OCR token: \nAnswer.",
            "text": text,
        }
        for i, (word, text) in ((1, ("red? or blue", "bag")), (2, ("blue", "Blue.")), (0, ("red", "red")))
    ]
    path = write(tmp_path / "llava.jsonl", lines)
    found = replay_outputs(path, task, PAPER)
    assert metric(found, "exact_match") == (pytest.approx(2 / 3), None)
    assert (found.num_scores, len(found.other_prompts), found.metrics_file) == (0, 3, None)
    without = [{key: value for key, value in line.items() if key != "prompt"} for line in lines]
    with pytest.raises(DataError, match="2 ids that no item has: im0, im0"):
        replay_outputs(write(path, without), task, PAPER)


def test_every_item_needs_one_output(tmp_path: Path) -> None:
    ids = ["q0", "q0", "q1", "q7", "q8"]
    path = write(tmp_path / "a.jsonl", [{"id": name, "prediction": "red"} for name in ids])
    with pytest.raises(DataError) as caught:
        replay_outputs(path, gqa(), PAPER)
    assert str(caught.value).splitlines() == [
        f"{path} has 5 outputs for 4 items:",
        "2 ids without an output: q2, q3",
        "1 ids with several outputs: q0",
        "2 ids that no item has: q7, q8",
    ]


def test_other_records_are_noticed_by_their_targets(tmp_path: Path) -> None:
    lines = [{"doc_id": i, "target": "blue", "filtered_resps": ["red"]} for i in range(4)]
    with pytest.raises(DataError, match=r"4 of 4 items have another target .*(\n.*)*'blue' there, 'red' in"):
        replay_outputs(write(tmp_path / "a.jsonl", lines), gqa(), PAPER)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1|found none"),
        ("[]", "found none"),
        ("7", "expected JSON lines, a list, or an object"),
        ('{"logs": 7}', "expected JSON lines, a list, or an object"),
        ('{"id": "a", "prediction": "x"}\n{"id": "b"', "line 2: not JSON"),
        (
            '{"id": "a"}\n{"id": "b", "text": "x"}\n',
            r"line 1: expected .*\n.*line 2: expected .* found id, text",
        ),
        ('{"doc_id": 1, "filtered_resps": ["x", "y"]}', "not one answer of text"),
        ('{"doc_id": "x", "filtered_resps": ["x"]}', "entry 0: expected"),
        ("[7]", "entry 0: expected .* found int"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("\ud800", "UTF-8"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=message):
        read_outputs(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match=f"at most {MAX_BYTES} are read"):
        read_outputs(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"results": {"pope": {}}}', "metrics of gqa, found pope"), ("[", "not JSON"), ("[]", "found nothing")],
)
def test_a_results_file_of_something_else(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": f"q{i}", "prediction": "red"} for i in range(4)])
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=message):
        replay_outputs(path, gqa(), PAPER)


def test_a_score_that_is_none(tmp_path: Path) -> None:
    lines = [{"id": f"q{i}", "prediction": "red", "score": {"score": "high"}} for i in range(4)]
    with pytest.raises(DataError, match="q0: no score can be read from"):
        replay_outputs(write(tmp_path / "a.jsonl", lines), gqa(), PAPER)
