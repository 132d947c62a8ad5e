"""The embedded default: what the scenes promise, and parts that the models layer can load."""

from collections import Counter, defaultdict
from hashlib import sha256
from json import loads
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from morebench.config.compose import CONF_DIR, load_chat_format, load_shape
from morebench.config.schema import LLM, VisualScale, Weights
from morebench.data.chat import ChatFormat
from morebench.data.images import load_image, resolve_inside
from morebench.data.store import open_records
from morebench.digits import scenes, tiny_llm, tiny_vision
from morebench.digits.fitting import schedule
from morebench.digits.look_back import start_looking_back
from morebench.digits.questions import SHORT_ANSWER, ask_presence, open_questions
from morebench.digits.render import load_scans, render
from morebench.digits.text_worlds import draw_page
from morebench.digits.tiny_tokenizer import FAMILIES
from morebench.digits.tiny_vision import draw_full_scene, make_views, patch_targets
from morebench.digits.tiny_vit import build_vit, penultimate, trained_parameters
from morebench.digits.world import Scene, Thing, draw_scene
from morebench.errors import ConfigError
from morebench.models.llm import llm_config, load_llm, load_tokenizer
from morebench.models.vision import OpenClipEncoder, TimmEncoder

TASKS = ("digits_vqa", "digits_pope", "digits_mc")
TINY_LLMS = {"gemma2": "gemma2_tiny", "phi": "phi_tiny", "llama": "llama_tiny"}
TINY_ENCODERS = {"clip_tiny": "open_clip", "dinov2_tiny": "timm", "siglip_tiny": "timm"}
ENCODERS = {"open_clip": OpenClipEncoder, "timm": TimmEncoder}


def file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def build_scenes(folder: Path, seed: int = 0) -> Path:
    scenes.build(folder, seed, num_pretrain=60, num_finetune=200, num_test_scenes=200, num_test_items=600)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scenes(tmp_path_factory.mktemp("digits") / "digits")


def read_task(data: Path, name: str) -> list[dict[str, Any]]:
    return loads((data / f"{name}.json").read_text())


# scenes


def test_a_seed_gives_the_same_bytes_and_another_seed_others(data: Path, tmp_path: Path) -> None:
    again = build_scenes(tmp_path / "again")
    assert file_hashes(again) == file_hashes(data)
    other = build_scenes(tmp_path / "other", seed=1)
    assert (other / "finetune.json").read_bytes() != (data / "finetune.json").read_bytes()


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    build_scenes(tmp_path / "digits")
    assert list((tmp_path / "digits").iterdir()) == []


def test_no_scan_is_shared_between_train_and_test(data: Path) -> None:
    drawn = loads((data / scenes.SCAN_IDS).read_text())
    used = {"train": set(), "test": set()}
    for name, ids in drawn.items():
        used["test" if name.startswith("test_") else "train"] |= set(ids)
    train, test = load_scans()
    assert used["train"] <= set(train.ids.tolist())
    assert used["test"] <= set(test.ids.tolist())
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    assert len(train.ids) + len(test.ids) == 1797
    assert len(used["test"]) > 200


def test_no_two_scans_of_different_splits_are_the_same_image() -> None:
    train, test = load_scans()
    seen = {scan.tobytes() for scan in train.images}
    assert not [index for index, scan in zip(test.ids, test.images, strict=True) if scan.tobytes() in seen]


def test_digits_lie_apart_inside_the_central_square() -> None:
    train, _ = load_scans()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        picture = render(scene, train, rng)
        width, height = picture.image.size
        assert 56 <= min(width, height) <= max(width, height) <= 84
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        covered = np.zeros((height, width), dtype=int)
        for thing, box in zip(scene.things, picture.boxes, strict=True):
            assert 20 <= box.size <= 28
            assert left <= box.left <= left + side - box.size
            assert top <= box.top <= top + side - box.size
            middle_x, middle_y = box.left + box.size / 2, box.top + box.size / 2
            assert ("left" in thing.place) == (middle_x < width / 2)
            assert ("top" in thing.place) == (middle_y < height / 2)
            covered[box.top : box.top + box.size, box.left : box.left + box.size] += 1
        assert covered.max() == 1


def test_digit_colour_and_place_each_name_one_thing() -> None:
    for seed in range(200):
        things = draw_scene(np.random.default_rng(seed)).things
        for attribute in ("digit", "colour", "place"):
            values = [getattr(thing, attribute) for thing in things]
            assert len(set(values)) == len(values)


# records


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_records_are_llava_records_with_images_that_open(data: Path, name: str, tmp_path: Path) -> None:
    samples = open_records(data / f"{name}.json", tmp_path)
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        for image in sample.images:
            load_image(resolve_inside(data / "images", image))


def test_finetune_has_text_only_records_and_images_after_the_question(data: Path, tmp_path: Path) -> None:
    samples = open_records(data / "finetune.json", tmp_path)
    text_only = [sample for sample in samples if not sample.images]
    image_last = [sample for sample in samples if sample.turns[0].question.endswith("\n<image>")]
    assert 0.03 < len(text_only) / len(samples) < 0.2
    assert 0.1 < len(image_last) / len(samples) < 0.35
    assert max(len(sample.turns) for sample in samples) > 2


def test_training_asks_in_the_words_of_the_tasks(data: Path, tmp_path: Path) -> None:
    samples = open_records(data / "finetune.json", tmp_path)
    texts = "\n".join(turn.question for sample in samples for turn in sample.turns)
    assert SHORT_ANSWER in texts
    assert "\nAnswer with the option's letter from the given choices directly." in texts
    for name in TASKS:
        for record in read_task(data, name):
            opening = " ".join(record["question"].split()[:2])
            assert opening in texts


# tasks


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("digits_vqa", {"id", "imageId", "image", "question", "answer", "fullAnswer"}),
        (
            "digits_pope",
            {"id", "question_id", "question", "answer", "image_source", "image", "category"},
        ),
        ("digits_mc", {"id", "image", "question", "options", "answer"}),
    ],
)
def test_task_records_have_the_fields_of_their_benchmark(data: Path, name: str, fields: set[str]) -> None:
    records = read_task(data, name)
    assert len(records) == 600
    assert all(record.keys() == fields for record in records)
    assert len({record["id"] for record in records}) == len(records)
    per_image = Counter(record["image"] for record in records)
    assert all((data / "images" / image).is_file() for image in per_image)
    assert max(per_image.values()) > 1


@pytest.mark.parametrize(("name", "at_most"), [("digits_vqa", 0.35), ("digits_pope", 0.65)])
def test_guessing_from_the_question_alone_earns_little(data: Path, name: str, at_most: float) -> None:
    """The bound is generous: it knows how often the test set gives each answer to each question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    records = read_task(data, name)
    for record in records:
        answers[record["question"]][record["answer"]] += 1
    assert sum(max(counts.values()) for counts in answers.values()) / len(records) <= at_most


def test_pope_is_balanced_in_every_category(data: Path) -> None:
    counts = Counter((record["category"], record["answer"]) for record in read_task(data, "digits_pope"))
    assert counts == {
        (category, answer): 100
        for category in ("random", "popular", "adversarial")
        for answer in ("yes", "no")
    }


def test_multiple_choice_puts_the_answer_at_each_letter_equally_often(data: Path) -> None:
    records = read_task(data, "digits_mc")
    assert Counter(record["answer"] for record in records) == dict.fromkeys("0123", 150)
    assert all(len(set(record["options"])) == 4 for record in records)


def test_answers_are_what_the_scene_shows() -> None:
    scene = Scene((Thing(3, "red", "top left"), Thing(7, "blue", "bottom right")))
    assert scene.caption() == "a red three at the top left and a blue seven at the bottom right"
    answers = {question.text: question.answer for question in open_questions(scene)}
    assert answers["How many digits are there?"] == "2"
    assert answers["What digit is at the bottom right?"] == "seven"
    assert answers["What digit is red?"] == "three"
    assert answers["What colour is the seven?"] == "blue"
    assert answers["What colour is the digit at the top left?"] == "red"
    assert answers["Where is the three?"] == "top left"
    assert answers["Where is the blue digit?"] == "bottom right"
    assert len(answers) == 13
    assert ask_presence(8, scene).text == "Is there an eight in the image?"
    assert [ask_presence(digit, scene).answer for digit in (8, 7)] == ["no", "yes"]


# tiny vision encoders


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_a_built_encoder_is_reproducible_and_read_before_its_last_block(name: str, tmp_path: Path) -> None:
    provider, shape = TINY_ENCODERS[name], f"vision/{name}.json"
    for copy in ("one", "two"):
        tiny_vision.build(tmp_path / copy, provider, shape, seed=0, steps=2, batch_size=2)
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "two")
    assert sorted(file_hashes(tmp_path / "one")) == ["config.json", "model.safetensors"]
    facts = load_shape(shape)
    assert loads((tmp_path / "one" / "config.json").read_text()) == facts

    encoder = ENCODERS[provider](facts, tmp_path / "one", feature_layer=-2).eval()
    whole = build_vit(provider, facts).eval()
    from safetensors.torch import load_file

    whole.load_state_dict(load_file(tmp_path / "one" / "model.safetensors"))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), penultimate(whole, pixels))


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_training_reaches_every_weight_that_the_mllm_reads(name: str) -> None:
    model = build_vit(TINY_ENCODERS[name], load_shape(f"vision/{name}.json"))
    penultimate(model, torch.randn(1, 3, 56, 56)).square().sum().backward()
    matrices, others = trained_parameters(model)
    trained = {id(parameter) for parameter in [*matrices, *others]}
    assert len(trained) == len(matrices) + len(others)
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_encoders_learn_from_the_pixels_that_cells_see(name: str) -> None:
    """The builder takes mean and std from timm; the config group states them for the cells."""
    image = yaml.safe_load((CONF_DIR / "vision" / f"{name}.yaml").read_text())["image"]
    for view in make_views(TINY_ENCODERS[name], load_shape(f"vision/{name}.json")):
        assert view.processor.processing.mean == image["mean"]
        assert view.processor.processing.std == image["std"]


def test_patch_targets_follow_the_digit_through_every_view() -> None:
    train, _ = load_scans()
    facts = load_shape("vision/siglip_tiny.json")
    patch_size, grid_size = facts["patch_size"], facts["image_size"] // facts["patch_size"]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = Scene((Thing(0, "white", "bottom left"),))
        picture = render(scene, train, rng)
        for view in make_views("timm", facts):
            ink = np.argwhere(view.processor(picture.image).mean(2) > 0.65 * 255)
            targets = patch_targets(scene, picture, view, facts)
            patches = np.flatnonzero(targets[0])
            assert set(targets[:, patches].T.reshape(-1, 3).flatten().tolist()) == {1, 5, 3}
            middle = (np.stack(np.divmod(patches, grid_size)).mean(1) + 0.5) * patch_size
            assert np.abs(middle - ink.mean(0)).max() < patch_size / 2


def test_full_scenes_fill_most_quarters() -> None:
    counts = [len(draw_full_scene(np.random.default_rng(seed)).things) for seed in range(200)]
    assert 3.3 < np.mean(counts) < 3.9
    assert min(counts) >= 1


def test_an_unknown_provider_or_family_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open_clip, timm"):
        tiny_vision.build(tmp_path / "x", "hub", "vision/clip_tiny.json", seed=0)
    with pytest.raises(ConfigError, match="gemma2, phi, llama"):
        tiny_llm.build(tmp_path / "x", "gpt", "llm/llama_tiny.json", seed=0)
    assert list(tmp_path.iterdir()) == []


# tiny LLMs


def llm_config_of(family: str) -> LLM:
    member = FAMILIES[family]
    return LLM(
        label="x",
        size_group="x",
        weights=Weights(folder=None, hub_id=None, revision=None, build={}),
        shape=f"llm/{TINY_LLMS[family]}.json",
        chat_format=member.chat_format,
        pad_token=member.pad,
        visual_scale=VisualScale.one,
    )


@pytest.fixture(scope="module", params=list(TINY_LLMS))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(family, its folder, the same built again)."""
    family = request.param
    root = tmp_path_factory.mktemp(family)
    for copy in ("one", "two"):
        tiny_llm.build(root / copy, family, f"llm/{TINY_LLMS[family]}.json", seed=0, steps=2, batch_size=2)
    return family, root / "one", root / "two"


def test_a_built_llm_is_reproducible_and_fits_its_shape(llm: tuple[str, Path, Path]) -> None:
    family, folder, again = llm
    assert file_hashes(folder) == file_hashes(again)
    model = load_llm(llm_config_of(family), folder, torch.float32)
    assert model.config.model_type == {"gemma2": "gemma2", "phi": "phi3", "llama": "llama"}[family]
    assert model.config.tie_word_embeddings == (family != "llama")


def test_any_text_survives_the_tokenizer(llm: tuple[str, Path, Path]) -> None:
    tokenizer = load_tokenizer(llm_config_of(llm[0]), llm[1])
    for text in ("a red three at the top left", "Straße 北京 🙂\n\ttab", "A. one\nB. two", "<image> literal"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= load_shape(f"llm/{TINY_LLMS[llm[0]]}.json")["vocab_size"]


def test_the_familys_chat_layout_uses_single_control_tokens(llm: tuple[str, Path, Path]) -> None:
    family, folder, _ = llm
    tokenizer = load_tokenizer(llm_config_of(family), folder)
    for token in FAMILIES[family].control_tokens:
        assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token)) == token
    chat = ChatFormat.from_dict(load_chat_format(FAMILIES[family].chat_format))
    prompt = chat.encode_prompt("<image>\nWhat digit is red?", tokenizer, num_visual_tokens=16)
    assert prompt.visual_mask.sum() == 16
    ends = chat.end_token_ids(tokenizer)
    expected = {
        "gemma2": ["<end_of_turn>", "<eos>"],
        "phi": ["<|end|>", "<|endoftext|>"],
        "llama": ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    }
    assert tokenizer.convert_ids_to_tokens(ends) == expected[family]


def test_tiny_gemmas_window_is_shorter_than_an_image() -> None:
    facts = load_shape("vision/clip_tiny.json")
    assert (
        load_shape("llm/gemma2_tiny.json")["sliding_window"]
        < (facts["image_size"] // facts["patch_size"]) ** 2
    )


def test_the_packed_loss_of_a_batch_is_that_of_its_samples(llm: tuple[str, Path, Path]) -> None:
    """No sample reads its neighbour: the mean over two equal samples is the loss of one."""
    family, folder, _ = llm
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=tiny_llm.VARLEN)
    tokenizer = load_tokenizer(llm_config_of(family), folder)
    chat = ChatFormat.from_dict(load_chat_format(FAMILIES[family].chat_format))
    writer = tiny_llm.Writer(chat, tokenizer)
    sample = writer.draw(np.random.default_rng(0))
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_llm.packed_loss(model, [sample, sample]), tiny_llm.packed_loss(model, [sample])
        )


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    values = [schedule(step, 100) for step in range(100)]
    assert values[0] < values[4] == max(values)
    assert values[-1] < 0.001


@pytest.mark.parametrize("family", TINY_LLMS)
def test_the_first_block_starts_by_looking_back(family: str) -> None:
    """Head h reads the token h + 1 places back more than any other, over random tokens."""
    config = llm_config(load_shape(f"llm/{TINY_LLMS[family]}.json"))
    config.initializer_range, config.pad_token_id = tiny_llm.INITIALIZER_RANGE, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    start_looking_back(model)
    with torch.no_grad():
        (attention_HTT,) = model(torch.randint(0, 500, (1, 30)), output_attentions=True).attentions[0]
    for head, weights_TT in enumerate(attention_HTT):
        by_distance = [float(weights_TT.diagonal(-distance).mean()) for distance in range(12)]
        assert np.argmax(by_distance) == head + 1


def test_a_page_asks_what_its_scene_tells() -> None:
    kinds = set()
    for seed in range(100):
        (told, asked), *lookups = draw_page(np.random.default_rng(seed))
        assert not asked
        words = set(told.replace(".", "").replace(",", "").split())
        assert any(answer for _, answer in lookups)
        for (key, _), (answer, _) in zip(lookups[::2], lookups[1::2], strict=False):
            if key.endswith(":"):
                kinds.add("cards")
                assert {*key[:-1].split(), *answer.split()} <= words
            else:
                kinds.add("questions")
        if len(lookups) == 1:
            kinds.add("caption")
    assert kinds == {"cards", "questions", "caption"}
