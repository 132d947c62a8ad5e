"""Questions as the two harnesses ask them, and records that cannot be asked."""

import subprocess
import sys

import pytest

from morebench.config.compose import build, compose_config
from morebench.config.schema import Profile
from morebench.errors import ConfigError, DataError
from morebench.evaluation.tasks.ai2d import AI2D
from morebench.evaluation.tasks.benchmark import Benchmark, with_image_tokens
from morebench.evaluation.tasks.mmbench import MMBench
from morebench.evaluation.tasks.mme import MME
from morebench.evaluation.tasks.mmmu import MMMU
from morebench.evaluation.tasks.pope import POPE
from morebench.evaluation.tasks.scienceqa import ScienceQA
from morebench.evaluation.tasks.seedbench import SEEDBench

PAPER, NEWER = Profile.paper, Profile.lmms_eval_0_7_3
MMMU_CHOICE = {"id": "validation_Art_1", "question_type": "multiple-choice"}


def test_images_without_a_token_of_their_own_get_one_or_one_each() -> None:
    images = ("image[0]", "image[1]")
    assert with_image_tokens("why?", images, PAPER).text == "<image>\nwhy?"
    assert with_image_tokens("why?", images, PAPER).images == ("image[0]",)
    assert with_image_tokens("why?", images, NEWER).text == "<image> <image>\nwhy?"
    assert with_image_tokens("why?", images, NEWER).images == images


def test_an_image_token_too_many_is_an_error() -> None:
    record = {"question": "<image> <image 1>?", "question_type": "open"}
    with pytest.raises(DataError, match=r"2 times <image> for 1 image"):
        MMMU().question(record, PAPER)


def test_text_with_image_tokens_stays_as_it_is() -> None:
    assert with_image_tokens("<image> why?", ("a",), PAPER).text == "<image> why?"
    assert with_image_tokens("why?", (), PAPER).text == "why?"


@pytest.mark.parametrize(
    ("frames", "profile", "images"),
    [
        ("profile", PAPER, ("image[0]",)),
        ("profile", NEWER, ("image[0]", "image[1]", "image[2]")),
        ("middle", PAPER, ("image[1]",)),
        ("first", NEWER, ("image[0]",)),
        ("all", PAPER, ("image[0]", "image[1]", "image[2]")),
    ],
)
def test_seed_videos_show_the_chosen_frames(frames: str, profile: Profile, images: tuple[str, ...]) -> None:
    record = {f"choice_{letter}": letter for letter in "abcd"}
    video = record | {"question": "?", "answer": "A", "data_type": "video", "image": [1, 2, 3]}
    assert SEEDBench(frames).question(video, profile).images == images
    assert SEEDBench(frames).question(video | {"data_type": "image"}, profile).images == ("image",)


@pytest.mark.parametrize(
    ("benchmark", "record"),
    [
        (AI2D(), {"options": ["a", "b"], "answer": "2"}),
        (AI2D(), {"options": ["a", "b"], "answer": "B"}),
        (ScienceQA(), {"choices": ["a", "b"], "answer": 2}),
        (SEEDBench(), {"answer": "E", "data_type": "image"}),
        (SEEDBench(), {"answer": "A", "data_type": "sound"}),
        (POPE(), {"answer": "maybe"}),
        (MME(), {"category": "OCR", "answer": "7"}),
        (MMMU(), {"id": "Art", "question_type": "open", "answer": "7"}),
        (MME(), {"category": "chess", "answer": "Yes"}),
        (MMBench("en"), {"answer": "C", "C": "nan"}),
        (MMMU(), MMMU_CHOICE | {"options": "['a']", "answer": "B"}),
        (MMMU(), MMMU_CHOICE | {"options": "['a', 'b']", "answer": "AB"}),
        (MMMU(), MMMU_CHOICE | {"options": "['a'", "answer": "A"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_answer_that_is_no_option_is_an_error(benchmark: Benchmark, record: dict[str, object]) -> None:
    with pytest.raises(DataError):
        benchmark.target(record)


def test_unknown_choices_of_a_benchmark_are_config_errors() -> None:
    for make in (lambda: SEEDBench("last"), lambda: MMBench("fr"), lambda: MMBench("en", "gpt")):
        with pytest.raises(ConfigError, match="must be one of"):
            make()


@pytest.mark.parametrize("suite", ["digits", "llava_more_13"])
def test_every_task_of_a_suite_builds_and_every_column_has_a_task(suite: str) -> None:
    config = compose_config([f"suite={suite}"]).config.suite
    assert all(isinstance(build(task.code), Benchmark) for task in config.tasks.values())
    assert {column.task for column in config.columns} == set(config.tasks)
    assert all(
        set(task.max_new_tokens) == {profile.name for profile in Profile} for task in config.tasks.values()
    )


def test_the_paper_suite_has_13_columns() -> None:
    columns = compose_config(["suite=llava_more_13"]).config.suite.columns
    labels = "GQA Science-QA TextVQA AI2D POPE MME-P MME-C MMB-Cn MMB-En SEED-All SEED-V SEED-I MMMU"
    assert [column.label for column in columns] == labels.split()


def test_scoring_does_not_import_torch() -> None:
    code = (
        "import sys, morebench.evaluation.golden; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
