"""Every measured case of the reference scorers, in both profiles, and the rules no case covers."""

import json
from pathlib import Path

import pytest

from morebench.config.schema import Profile
from morebench.errors import EXIT_FAILED, EXIT_USER, DataError
from morebench.evaluate import command
from morebench.evaluation.golden import replay
from morebench.evaluation.mmbench_letters import guess_letter
from morebench.evaluation.mmmu_answers import parse_open
from morebench.evaluation.scoring import exact_match, score_items, without_reasoning
from morebench.evaluation.tasks.ai2d import AI2D
from morebench.evaluation.tasks.benchmark import Benchmark, Scored
from morebench.evaluation.tasks.gqa import GQA
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.evaluation.tasks.pope import POPE
from morebench.evaluation.tasks.scienceqa import ScienceQA
from morebench.evaluation.tasks.seedbench import SEEDBench

MMMU_CHOICE = {
    "id": "validation_Art_1",
    "question_type": "multiple-choice",
    "options": ["a", "b"],
    "answer": "A",
}
MMBENCH_ROW = {"index": 1, "answer": "A", "A": "cat", "B": "dog", "C": "nan", "D": "nan", "category": "c"}

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
NUM_COMPARED = {
    "ai2d": 90,
    "gqa": 74,
    "mmbench": 349,
    "mmbench_circular": 56,
    "mme": 234,
    "mmmu": 500,
    "pope": 74,
}
NUM_COMPARED |= {"prompts": 85, "scienceqa": 74, "seed": 86, "textvqa": 242, "vqa_normalizer": 172}
OF_OTHER_TOOLS = {
    "vlmevalkit_parsed",
    "vlmevalkit_score",
    "aggregate.vlmevalkit_exact_matching",
    "score_official_mmmu",
    "aggregate.official_mmmu_accuracy_note",
    "text_with_ocr_0_7_3",
    "chat_content_0_7_3",
}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_scores_and_aggregates_equal_the_reference(path: Path) -> None:
    result = replay(path)
    assert result.differences == ()
    assert result.num_compared == NUM_COMPARED[path.stem]
    assert set(result.not_compared) <= OF_OTHER_TOOLS


def test_a_changed_expectation_is_reported(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN[0].parent / "gqa.json").read_text(encoding="utf-8"))
    golden["cases"][0]["score"] = 0.0
    golden["aggregate"]["paper"]["exact_match"] += 2e-9
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(golden))
    result = replay(path)
    assert [line.partition(":")[0] for line in result.differences] == [
        "gqa-small-0000 score",
        "aggregate.paper.exact_match",
    ]


def test_what_we_have_no_value_for_is_named(tmp_path: Path) -> None:
    case = {"prediction": "Yes", "record": {"question": "?", "answer": "yes"}, "score": 1, "beauty": 7}
    golden = {"cases": [case], "aggregate": {"paper": {"exact_match": 1, "kindness": {"a": 1}}}, "extra": 1}
    path = tmp_path / "gqa-large.json"  # without a benchmark: the file's name says it
    path.write_text(json.dumps(golden))
    result = replay(path)
    assert (result.num_compared, result.differences) == (2, ())
    assert result.not_compared == ("beauty", "aggregate.paper.kindness", "extra")


def test_numbers_that_are_not_finite_may_be_text_or_numbers(tmp_path: Path) -> None:
    record = {"id": "validation_Art_1", "question": "?", "options": "[]", "answer": "inf"}
    record["question_type"] = "open"
    cases = [
        {"prediction": "inf", "record": record, "score": 1.0, "parsed": ["inf"], "random_fallback": False},
        {"prediction": "nan", "record": record | {"answer": "nan"}, "score": 0.0, "parsed": [float("nan")]},
    ]
    path = tmp_path / "mmmu.json"
    path.write_text(json.dumps({"cases": cases}))
    assert replay(path).differences == ()
    assert replay(path).num_compared == 5


def test_one_odd_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("nonsense")
    (tmp_path / "b.json").write_text(json.dumps({"benchmark": "gqa", "cases": [{"prediction": "x"}]}))
    (tmp_path / "c.json").write_bytes((GOLDEN[0].parent / "gqa.json").read_bytes())
    assert command([f"golden={tmp_path}"]) == EXIT_USER
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*(str(tmp_path / f"{x}.json") for x in "ab"), "c"]
    broken = json.loads((tmp_path / "c.json").read_text())
    broken["cases"][3]["score"] = 0.5
    (tmp_path / "d.json").write_text(json.dumps(broken))
    assert command([f"golden={tmp_path}"]) == EXIT_FAILED
    assert "gqa-small-0003 score: expected 0.5, found 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"benchmark": "chess", "cases": []}'])
def test_a_file_without_golden_cases_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"odd\.json"):
        replay(path)


def test_reasoning_is_removed_in_the_newer_profile_only() -> None:
    answered = [("<think>\nred or blue?</think> Blue", {"question": "?", "answer": "blue"})]
    scores = [score_items(GQA(), answered, profile)[0].score for profile in Profile]
    assert scores == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("red?</think> no</think>Blue", "Blue"),  # the prompt may have opened it: the last closing tag counts
        ("<think>red</think> a <think>b</think>Blue", "a Blue"),
        ("</think>x<think>red", "</think>x<think>red"),  # closed before it opens
        ("<think>red", "<think>red"),
        ("<THINK>red</THINK>Blue", "<THINK>red</THINK>Blue"),
        ("<analysis>red</analysis><think>x</think> Blue ", "Blue"),
    ],
)
def test_reasoning_tags_that_do_not_pair(text: str, left: str) -> None:
    assert without_reasoning(text, Profile.lmms_eval_0_7_3) == left
    assert without_reasoning(text, Profile.paper) == text


def test_ai2d_cuts_a_leading_letter_out_before_reasoning_goes() -> None:
    record = {"question": "?", "options": ["a", "b"], "answer": "1"}
    answered = [("<think>?</think>B. b", record), ("B. b <think>or A?</think>", record)]
    assert [item.score for item in score_items(AI2D(), answered, Profile.lmms_eval_0_7_3)] == [0.0, 1.0]


def test_exact_match_keeps_inner_nul() -> None:
    assert exact_match("y\0es", "yes") == 0.0
    assert exact_match("yes.\0!", "yes") == 1.0


def test_exact_match_has_the_fixed_width_of_the_reference() -> None:
    # "İ" is two characters in lower case; the second pushes the last one out.
    assert exact_match("İa", "i\u0307") == 1.0
    assert exact_match("İa", "i\u0307a") == 0.0


def test_mmmu_sums_subject_by_subject_before_it_rounds() -> None:
    # 14 of 32 is 0.4375; summed like the reference it falls just short of that.
    right = {"Art": [True, *[False] * 8], "Math": [True] * 13 + [False] * 10}
    items = [
        Scored(float(score), None, record={"subject": subject})
        for subject, scores in right.items()
        for score in scores
    ]
    assert MMMU().aggregate(items, Profile.paper)["mmmu_acc"] == 0.437
    assert round(14 / 32, 3) == 0.438


@pytest.mark.parametrize(
    ("benchmark", "record", "readable", "unreadable"),
    [
        (AI2D(), {"options": ["a", "b"], "answer": "1"}, ["B", "(a)", "B."], ["C", "b is it", ""]),
        (ScienceQA(), {"choices": ["a", "b"], "answer": 1}, ["B", "A. x"], ["a", "C", "(B)", ""]),
        (SEEDBench(), {"answer": "A", "data_type": "image"}, ["A", "Dog"], ["a", "(A)", "E", ""]),
        (MME(), {"question_id": "1", "category": "OCR", "answer": "Yes"}, ["yes", "Note"], ["y", ""]),
        (POPE(), {"answer": "yes"}, ["yes", " NO"], ["yes.", ""]),
        (MMMU(), MMMU_CHOICE, ["A", "(B)", "A or B"], ["C", "x", ""]),
        (MMBench("en"), MMBENCH_ROW, ["A", "E", "a cat"], ["", "bird", "cat and dog"]),
        (GQA(), {"answer": "yes"}, ["yes", ""], []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_rule_reads_is_flagged(
    benchmark: Benchmark, record: dict[str, object], readable: list[str], unreadable: list[str]
) -> None:
    for texts, expected in ((readable, False), (unreadable, True)):
        items = score_items(benchmark, [(text, record) for text in texts], Profile.paper)
        assert [("unparsed" in item.flags) for item in items] == [expected] * len(texts)


def test_parts_have_names_that_no_metric_has() -> None:
    record = {"question_id": "1", "category": "count", "answer": "Yes"}
    metrics = MME().aggregate(score_items(MME(), [("yes", record)] * 2, Profile.paper), Profile.paper)
    assert metrics == {
        "mme_perception_score": 200.0,
        "mme_cognition_score": 0.0,
        "by_category/count": 200.0,
    }
    rows = [("A", {"answer": "A", "data_type": "image", "question_type_id": n}) for n in (1, 1, 5)]
    rows.append(("B", rows[0][1]))
    metrics = SEEDBench().aggregate(score_items(SEEDBench(), rows, Profile.paper), Profile.paper)
    assert metrics["by_question_type/1"] == pytest.approx(2 / 3)
    assert metrics["by_question_type/5"] == 1.0


def test_mmmu_guesses_depend_on_the_seed_of_the_task_alone() -> None:
    record = {
        "id": "validation_Art_1",
        "question": "?",
        "options": ["a", "b", "c"],
        "answer": "A",
        "question_type": "multiple-choice",
    }
    first = score_items(MMMU(), [("??", record)] * 5, Profile.paper)
    again = score_items(MMMU(), [("??", record)] * 5, Profile.paper)
    assert [item.parsed for item in first] == [item.parsed for item in again]
    assert MMMU().aggregate(first, Profile.paper)["random_guesses"] == 5


def test_an_mmmu_list_of_answers_counts_as_one_text_unless_it_is_a_list() -> None:
    record = {"id": "validation_Math_15", "question_type": "open"}
    answers = (["24/7", "3.429"], "['24/7', '3.429']")
    answered = [("3.43", record | {"answer": answer}) for answer in answers]
    assert [item.score for item in score_items(MMMU(), answered, Profile.paper)] == [1.0, 0.0]


def test_an_empty_tail_wipes_the_tail_before_it() -> None:
    # Reference behaviour on a line that ends in an indicator: "is " gives "answer", "answer " gives nothing.
    assert parse_open("x is answer \n7") == [7.0, "x is answer \n7"]


def test_mmbench_counts_a_question_only_if_every_rotation_is_right() -> None:
    row = {"question": "?", "hint": "nan", "C": "nan", "D": "nan", "category": "c"}
    rows = [
        row | {"index": 7, "answer": "A", "A": "cat", "B": "dog"},
        row | {"index": 1_000_007, "answer": "B", "A": "dog", "B": "cat"},
        row | {"index": 8, "answer": "A", "A": "cat", "B": "dog"},
    ]
    benchmark = MMBench("en")
    answered = list(zip(["A", "A", "cat"], rows, strict=True))
    values = benchmark.aggregate(score_items(benchmark, answered, Profile.paper), Profile.paper)
    assert values == {"gpt_eval_score": 50.0, "unresolved_rows": 0.0, "by_category/c": 0.5}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C is not it, so B", "C"),  # two at the edges: the start is surer
        ("(A) and then D", "D"),  # the end is surer than brackets
        ("The answer is C (not A), I think", "A"),  # after a phrase the last letter counts
        ("(A) or B. or so", "A"),  # brackets before a period
        ("I pick B: no, D) it is", "D"),
        ("Bad, C maybe", "C"),  # B begins a word
        ("surely nothing", None),
        ("", None),
        ("xBx", "B"),  # anywhere, as a last resort
        ("答案是B吧", "B"),
    ],
)
def test_static_rules_take_the_surest_sign(text: str, letter: str | None) -> None:
    assert guess_letter(text) == letter


def test_pope_mean_of_categories_is_not_the_pooled_f1() -> None:
    def record(answer: str, category: str) -> dict[str, str]:
        return {"question": "?", "answer": answer, "category": category}

    answered = [
        ("yes", record("yes", "random")),
        ("yes", record("no", "popular")),
        ("no", record("no", "popular")),
    ]
    values = POPE().aggregate(score_items(POPE(), answered, Profile.paper), Profile.paper)
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["pope_f1_mean_of_categories"] == pytest.approx(0.5)
