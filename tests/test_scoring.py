"""Every measured case of the reference scorers, in both profiles, and the rules no case covers."""

import json
from pathlib import Path

import pytest

from morebench.config.schema import Profile
from morebench.errors import DataError
from morebench.evaluation.golden import replay
from morebench.evaluation.mmmu_answers import parse_open
from morebench.evaluation.scoring import exact_match, score_items
from morebench.evaluation.tasks.gqa import GQA
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.evaluation.tasks.pope import POPE

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
NUM_COMPARED = {
    "ai2d": 46,
    "gqa": 50,
    "mmbench": 90,
    "mmbench_circular": 18,
    "mme": 112,
    "mmmu": 214,
    "pope": 42,
}
NUM_COMPARED |= {"prompts": 68, "scienceqa": 50, "seed": 46, "textvqa": 98, "vqa_normalizer": 86}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_scores_and_aggregates_equal_the_reference(path: Path) -> None:
    result = replay(path)
    assert result.differences == ()
    assert result.num_compared == NUM_COMPARED[path.stem]


def test_a_changed_expectation_is_reported(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN[0].parent / "gqa.json").read_text(encoding="utf-8"))
    golden["cases"][0]["score"] = 0.0
    golden["aggregate"]["paper"]["exact_match"] += 2e-9
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(golden))
    result = replay(path)
    assert [line.partition(":")[0] for line in result.differences] == [
        "gqa-small-0000 (paper)",
        "exact_match (paper)",
    ]


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


def test_exact_match_keeps_inner_nul() -> None:
    assert exact_match("y\0es", "yes") == 0.0
    assert exact_match("yes.\0!", "yes") == 1.0


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
    assert values == {"gpt_eval_score": 50.0, "unresolved_rows": 0.0, "c": 0.5}


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
