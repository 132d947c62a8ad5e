"""A chat with finished runs: random weights, so answers mean nothing but are always the same."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_reference import Published
from PIL import Image

from morebench import chat, chat_terminal
from morebench.chat_options import read_options
from morebench.config.compose import compose_config, load_config
from morebench.config.schema import Config, Step
from morebench.data.records import IMAGE_TOKEN, Turn
from morebench.errors import ConfigError, DataError, NonFiniteError, RunError
from morebench.evaluation.conversation import DESCRIBE, Conversation
from morebench.evaluation.generate import Generator, Request
from morebench.evaluation.items import StoredImage, image_file
from morebench.evaluation.model import LoadedModel
from morebench.evaluation.panel import Member, Panel
from morebench.matrix import ledger
from morebench.matrix.imported import import_reference
from morebench.matrix.parent import Parent

CELL = ["recipe=digits", "suite=digits", "finetune_data=digits", "pretrain_data=digits", "trainer=cpu"]
NUM_TOKENS = 6
SHORT = f"max_new_tokens={NUM_TOKENS}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and two images."""
    root = tmp_path_factory.mktemp("chat")
    for llm in ("llama_tiny", "gemma2_tiny"):
        source = Published(llm, "clip_tiny").write(root / "published" / llm)
        import_reference(
            compose_config([f"llm={llm}", "vision=clip_tiny", *CELL, "tracking=none", f"paths.root={root}"]),
            source,
        )
    Image.linear_gradient("L").resize((60, 40)).save(root / "grey.png")
    Image.radial_gradient("L").resize((40, 60)).save(root / "round.png")
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> list[Path]:
    return sorted((root / "runs").iterdir(), reverse=True)  # llama, gemma2


@pytest.fixture(scope="module")
def panel(runs: list[Path]) -> Panel:
    members = [Member(run.name.split("_")[0], load_config(run / "config.yaml"), run) for run in runs]
    return Panel(members, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(panel: Panel) -> LoadedModel:
    return panel.load(0)


@pytest.fixture
def image(root: Path) -> StoredImage:
    return image_file(root / "grey.png")


def alone(model: LoadedModel, turns: list[Turn], question: str, images: tuple[StoredImage, ...]) -> str:
    """What one request answers, in the layout of a record."""
    return Generator(model).answer([request_of(model, turns, question, images)])[0].text


def request_of(
    model: LoadedModel, turns: list[Turn], question: str, images: tuple[StoredImage, ...]
) -> Request:
    prompt = model.chat.encode_conversation(
        turns, question, model.tokenizer, model.mllm.vision.num_visual_tokens
    )
    return Request(prompt, images, NUM_TOKENS)


def test_a_conversation_is_asked_as_the_record_of_its_turns(
    model: LoadedModel, image: StoredImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    stream = Generator.stream

    def heard(generator: Generator, request: Request) -> Any:
        asked.append(request)
        return stream(generator, request)

    monkeypatch.setattr(Generator, "stream", heard)
    conversation, first = Conversation(image, NUM_TOKENS), f"{IMAGE_TOKEN}\n{DESCRIBE}"
    answers = ["".join(conversation.ask(model, question)) for question in (DESCRIBE, "  Why?\n")]
    assert answers[0] == alone(model, [], first, (image,))
    assert conversation.turns == [Turn(DESCRIBE, answers[0]), Turn("Why?", answers[1])]
    assert conversation.notice == f"cut after {SHORT}"
    "".join(Conversation(None, NUM_TOKENS).ask(model, "Why?"))
    expected = [
        request_of(model, [], first, (image,)),
        request_of(model, [Turn(first, answers[0])], "Why?", (image,)),
        request_of(model, [], "Why?", ()),
    ]
    for found, wanted in zip(asked, expected, strict=True):
        np.testing.assert_array_equal(found.prompt.input_ids, wanted.prompt.input_ids)
        np.testing.assert_array_equal(found.prompt.visual_mask, wanted.prompt.visual_mask)
        assert (found.images, found.max_new_tokens) == (wanted.images, wanted.max_new_tokens)


def test_what_was_said_until_a_stop_stays(model: LoadedModel, image: StoredImage) -> None:
    conversation = Conversation(image, NUM_TOKENS)
    with closing(conversation.ask(model, DESCRIBE)) as pieces:
        said = next(pieces)
    assert conversation.turns == [Turn(DESCRIBE, said)]


def test_an_answer_that_failed_leaves_nothing_behind(
    model: LoadedModel, image: StoredImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(generator: Generator, request: Request) -> Iterator[str]:
        yield "half"
        raise NonFiniteError("NaN")

    monkeypatch.setattr(Generator, "stream", stream)
    conversation = Conversation(image, NUM_TOKENS)
    with pytest.raises(NonFiniteError):
        list(conversation.ask(model, DESCRIBE))
    assert conversation.turns == []


def test_a_full_conversation_says_so_and_stays_as_it_was(
    model: LoadedModel, image: StoredImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    stream = Generator.stream

    def heard(generator: Generator, request: Request) -> Any:
        asked.append(request.max_new_tokens)
        return stream(generator, request)

    monkeypatch.setattr(Generator, "stream", heard)
    conversation = Conversation(image, 40)
    config = model.mllm.llm.config
    before = len(model.prompt(f"{IMAGE_TOKEN}\n{DESCRIBE}").input_ids)
    positions, config.max_position_embeddings = config.max_position_embeddings, before + 3
    try:
        list(conversation.ask(model, DESCRIBE))
        turns = list(conversation.turns)
        assert asked == [3]
        assert "fills all positions" in str(conversation.notice)
        with pytest.raises(DataError, match=rf"tokens; .* has {before + 3} positions"):
            list(conversation.ask(model, "And?"))
    finally:
        config.max_position_embeddings = positions
    assert conversation.turns == turns


@pytest.mark.parametrize("question", [" \n", f"what is {IMAGE_TOKEN}?", "half a \ud83d"])
def test_a_question_that_is_none_is_refused(question: str, model: LoadedModel) -> None:
    conversation = Conversation(None, NUM_TOKENS)
    with pytest.raises(DataError, match="question"):
        list(conversation.ask(model, question))
    assert conversation.turns == []


def test_models_that_do_not_fit_together_are_loaded_one_at_a_time(panel: Panel, image: StoredImage) -> None:
    small = Panel(panel.members, torch.device("cpu"))
    small.holds_all = False
    for number in (0, 1, 0):
        answers = [
            "".join(each.ask(number, Conversation(image, NUM_TOKENS), DESCRIBE)) for each in (small, panel)
        ]
        assert answers[0] == answers[1]
        assert list(small._loaded) == [number]


def test_what_a_gpu_holds(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(
        parameter.numel() for number in (0, 1) for parameter in panel.load(number).mllm.parameters()
    )
    for free, fits in ((8 * weights, True), (4 * weights, False)):  # fp32
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert Panel(panel.members, torch.device("cuda")).holds_all is fits
    assert Panel(panel.members[:1], torch.device("cuda")).holds_all


def test_a_device_that_is_too_small_is_told(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(conversation: Conversation, model: LoadedModel, question: str) -> Iterator[str]:
        yield "half"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Conversation, "ask", ask)
    with pytest.raises(RunError, match="too small for llama's answer"):
        list(panel.ask(0, Conversation(None, NUM_TOKENS), "What?"))


def test_labels_say_in_what_runs_differ(panel: Panel) -> None:
    configs = [member.config for member in panel.members]
    parents = [Parent(name, Step.finetune, Path(), {}, configs[0]) for name in ("one", "two")]

    def labels(*configs: Config) -> list[str]:
        return chat._labels(list(zip(parents, configs, strict=True)))

    assert labels(*configs) == ["LLaMA-tiny, CLIP-tiny", "Gemma-2-tiny, CLIP-tiny"]
    other = replace(configs[0], seed=1)
    assert labels(configs[0], other) == ["LLaMA-tiny, CLIP-tiny, seed 0", "LLaMA-tiny, CLIP-tiny, seed 1"]
    assert labels(configs[0], configs[0])[1] == "LLaMA-tiny, CLIP-tiny, two"


def run(root: Path, *arguments: str) -> int:
    return chat.command([*arguments, f"paths.root={root}", "trainer=cpu"])


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_off_a_terminal_there_are_answers_and_nothing_else(
    root: Path,
    panel: Panel,
    model: LoadedModel,
    image: StoredImage,
    typed: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    single = Panel(panel.members[:1], torch.device("cpu"))

    def told(lines: str, image: StoredImage | None = image, prompt: str | None = None) -> str:
        typed(lines)
        assert chat_terminal.answer(single, image, prompt, NUM_TOKENS) == 0
        return capsys.readouterr().out

    first = alone(model, [], f"{IMAGE_TOKEN}\n{DESCRIBE}", (image,))
    assert told("") == f"{first}\n"
    assert told("not read", prompt="Red?") == alone(model, [], f"{IMAGE_TOKEN}\nRed?", (image,)) + "\n"
    why = alone(model, [Turn(f"{IMAGE_TOKEN}\n{DESCRIBE}", first)], "Why?", (image,))
    other = alone(model, [], f"{IMAGE_TOKEN}\n{DESCRIBE}", (image_file(root / "round.png"),))
    assert told(f"{DESCRIBE}\n\nWhy?\n/image {root}/round.png\n{DESCRIBE}\n") == f"{first}\n{why}\n{other}\n"
    with pytest.raises(DataError, match="nothing to ask"):
        told("", image=None)


def test_compared_runs_answer_below_each_other_under_their_labels(
    root: Path, runs: list[Path], panel: Panel, image: StoredImage, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ",".join(each.name for each in runs)
    assert run(root, f"compare=[{names}]", SHORT, f"image={image.name}", f"prompt={DESCRIBE}") == 0
    answers = [
        "".join(panel.ask(number, Conversation(image, NUM_TOKENS), DESCRIBE)) for number in range(len(runs))
    ]
    expected = f"LLaMA-tiny, CLIP-tiny:\n{answers[0]}\nGemma-2-tiny, CLIP-tiny:\n{answers[1]}\n"
    assert capsys.readouterr().out == expected


def talk(panel: Panel, monkeypatch: pytest.MonkeyPatch, lines: list[str], width: int = 100) -> None:
    answers: Iterator[str] = iter(lines)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert chat_terminal.talk(panel, None, None, NUM_TOKENS) == 0


def test_a_talk_goes_on_after_mistakes(
    panel: Panel, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "/image nowhere.png",
        "/imge",
        "what <image>",
        "/help",
        f"/image '{root}/grey.png'",
        "/reset",
        "",
    ]
    talk(panel, monkeypatch, lines)
    told = capsys.readouterr().out
    for words in ("nowhere.png: No such", "/imge: there is /image", "Leave it out", "/reset   ", "about "):
        assert words in told


@pytest.mark.parametrize("width", [30, 100])
def test_every_member_answers_whatever_happens_to_another(
    width: int, panel: Panel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(number: int, conversation: Conversation, question: str) -> Iterator[str]:
        yield "begun\x1b[2J"
        if number == 0:
            raise KeyboardInterrupt
        yield " and ended"

    monkeypatch.setattr(panel, "ask", ask)
    talk(panel, monkeypatch, ["What?", ""], width)
    told = " ".join(capsys.readouterr().out.split())
    assert "[stopped]" in told
    assert told.count("begun\N{REPLACEMENT CHARACTER}[2J") == 2
    assert "and ended" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["expected run=ID or compare=[ID1,ID2,...], found neither"]),
        (["run=a", "compare=[b,c]"], ["found both"]),
        (["compare=[a,a]"], ["a is named twice"]),
        (["compare=[a,b,c,d,e]"], ["expected 2 to 4 runs, found 5"]),
        (["run=a,b"], ["Several runs: compare=[a,b]"]),
        (["run=a", "imgae=x", "seed=1"], ["Did you mean image?", "seed=1: the run has it fixed"]),
        (["run=a", "trainer.acelerator=cpu"], ["Did you mean trainer.accelerator?"]),
        (["run=a", "max_new_tokens=-1", "port=80"], ["max_new_tokens=-1: expected", "port=...: only with"]),
        (["run=a", "page=maybe", "+x=1"], ["page=maybe: expected true or false", "not grown"]),
        (["run=a", "run=b", "image=x", "image=y"], ["run=... is given twice", "image=... is given twice"]),
    ],
)
def test_all_mistakes_of_a_command_line_at_once(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(arguments)
    assert len(str(caught.value).splitlines()) == len(words)
    for word in words:
        assert word in str(caught.value)


def test_texts_are_taken_as_they_are_typed() -> None:
    options = read_options(["run=a", "prompt=What's this, a {cat}?", "image=a=b.png"])
    assert (options.prompt, options.image) == ("What's this, a {cat}?", "a=b.png")
    quoted = read_options(["compare=b,a", 'prompt="Red, or blue?"', "image=null"])
    assert (quoted.prompt, quoted.image, quoted.runs) == ("Red, or blue?", None, ["b", "a"])


def test_runs_and_images_that_cannot_be_used_are_told_at_once(root: Path, runs: list[Path]) -> None:
    torn, other = root / "torn", root / "other"
    for folder, step in ((torn, "finetune"), (other, "pretrain")):
        folder.mkdir()
        for name in ("config.yaml", "cell.json"):
            (folder / name).write_bytes((runs[0] / name).read_bytes())
        (folder / "manifest.json").write_text(json.dumps({"run_id": folder.name, "step": step}))
    ledger.mark_done(other, [])
    (root / "text.png").write_text("no image")
    with pytest.raises(ConfigError) as caught:
        run(root, f"compare=[{torn},{other},nowhere]", f"image={root}/text.png")
    words = ["Only a finished run", "is a pretrain run", "nowhere is neither", "text.png: not an image"]
    for line, word in zip(str(caught.value).splitlines(), words, strict=True):
        assert word in line
