"""The Jinja template of every chat format against the ids of training and of generation."""

import json
from typing import Any

import numpy as np
import pytest
from factories_data import FORMATS, LLAMA_TOKENS, chat_format, tokenizer_for
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from morebench.data.chat import Encoded
from morebench.data.jinja_template import chat_template
from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.errors import ConfigError
from morebench.models.transformers_processor import messages, with_image_token

V = 3
CONVERSATIONS = [
    [Turn("What is this?", "A dog.")],
    [Turn(f"{IMAGE_TOKEN}\nWhat is this?", "A dog.")],
    [Turn(f"  What is this?\n{IMAGE_TOKEN} ", " A dog.\n"), Turn("Sure?", "Yes."), Turn("Really?", "No.")],
    [Turn("  spaces around  ", "  kept or not  "), Turn("\n\n", "x")],
    [Turn(f"{IMAGE_TOKEN} and {IMAGE_TOKEN}\nSame?", "No.")],
    [Turn(IMAGE_TOKEN, "A dog."), Turn('Braces {{ x }}, {question}, "quotes"\\', "{answer} {% if %}")],
    [Turn("Ünïcödé 狗", "é")],
]


def tokenizer_with_image(stem: str) -> PreTrainedTokenizerFast:
    chat = chat_format(stem)
    tokenizer = with_image_token(tokenizer_for(stem), chat)
    tokenizer.chat_template = chat_template(chat, tokenizer).jinja
    return tokenizer


def expected_ids(encoded: Encoded, image_id: int) -> list[int]:
    """Ours, with one image token in place of the visual tokens of an image."""
    ids, visual = encoded.input_ids.copy(), encoded.visual_mask
    ids[visual] = image_id
    number = np.cumsum(visual) - 1
    return ids[~visual | (number % V == 0)].tolist()


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("stem", FORMATS)
def test_a_conversation_has_the_ids_of_training(stem: str, turns: list[Turn]) -> None:
    tokenizer = tokenizer_with_image(stem)
    num_images = sum(turn.question.count(IMAGE_TOKEN) for turn in turns)
    sample = Sample("s", ("x",) * num_images, tuple(turns))
    encoded = chat_format(stem).encode(sample, tokenizer_for(stem), V, 10_000)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    found = tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    assert found == expected_ids(encoded, image_id)
    # what the tokenizer does when it is handed the rendered text: no second BOS
    assert tokenizer(tokenizer.apply_chat_template(messages(turns), tokenize=False))["input_ids"] == found


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("stem", FORMATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_prompt_has_the_ids_of_generation(
    stem: str, turns: list[Turn], add_generation_prompt: bool
) -> None:
    tokenizer = tokenizer_with_image(stem)
    encoded = chat_format(stem).encode_prompt(turns[0].question, tokenizer_for(stem), V)
    found = tokenizer.apply_chat_template(
        messages(turns[:1], with_answer=False),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    assert found == expected_ids(encoded, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


@pytest.mark.parametrize("stem", FORMATS)
def test_an_image_part_is_an_image_token_in_front(stem: str) -> None:
    tokenizer = tokenizer_with_image(stem)
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    for content in (parts, parts[::-1], f"{IMAGE_TOKEN}\nWhat is this?"):
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        assert text.count(f"{IMAGE_TOKEN}\nWhat is this?") == text.count(IMAGE_TOKEN) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([{"role": "system", "content": "Be brief."}], "must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "an <image>"}], "cannot hold"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not video"),
    ],
)
def test_what_was_never_trained_is_refused(said: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        tokenizer_with_image("llama_3_1").apply_chat_template(said, tokenize=False)


def test_control_tokens_spelt_out_can_be_kept_text() -> None:
    turn = Turn("Say <|eot_id|> now", "")
    tokenizer, chat = tokenizer_with_image("llama_3_1"), chat_format("llama_3_1")
    expected = chat.encode_prompt(turn.question, tokenizer_for("llama_3_1"), V).input_ids.tolist()
    said = messages([turn], with_answer=False)
    options = {"tokenize": True, "return_dict": False}
    assert tokenizer.apply_chat_template(said, sanitize_control_tokens=True, **options) == expected
    assert tokenizer.apply_chat_template(said, **options) != expected


def test_a_tokenizer_that_writes_its_bos_does_so_no_more() -> None:
    """As Llama's and Gemma's do."""
    content = json.loads(tokenizer_for("llama_3_1").backend_tokenizer.to_str())
    bos = "<|begin_of_text|>"
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token=bos)
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, theirs.bos_token_id)]
    )
    assert theirs("Hi")["input_ids"][0] == theirs.bos_token_id
    own = with_image_token(theirs, chat_format("llama_3_1"))
    assert own("Hi")["input_ids"] == theirs("Hi", add_special_tokens=False)["input_ids"]


def test_a_space_put_in_front_of_the_first_text_alone() -> None:
    """As transformers builds Vicuna's tokenizer."""
    content = json.loads(tokenizer_for("v1").backend_tokenizer.to_str())
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    content["pre_tokenizer"]["split"] = False
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)
    chat = chat_format("v1")
    own = with_image_token(theirs, chat)
    own.chat_template = chat_template(chat, own).jinja
    for turns in CONVERSATIONS:
        # it puts no space before one, which a text that holds prompt and answer cannot know
        if any(turn.answer.startswith(" ") for turn in turns):
            continue
        num_images = sum(turn.question.count(IMAGE_TOKEN) for turn in turns)
        encoded = chat.encode(Sample("s", ("x",) * num_images, tuple(turns)), theirs, V, 10_000)
        found = own.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
        assert found == expected_ids(encoded, own.convert_tokens_to_ids(IMAGE_TOKEN))


def test_a_format_without_a_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody can chat"):
        chat_template(chat_format("plain"), tokenizer_for("v1"))


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Cuts as GPT-2's does, and two newlines are one token: at the end of a text, not before a word."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters | {"ĊĊ": len(letters)}, [("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(LLAMA_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=LLAMA_TOKENS[0])


def test_a_tokenizer_that_joins_prompt_and_answer_keeps_the_prompt() -> None:
    theirs, chat = merging_tokenizer(), chat_format("llama_3_1")
    own = with_image_token(theirs, chat)
    template = chat_template(chat, own)
    assert not template.exact_history
    assert all(
        chat_template(
            chat_format(stem), with_image_token(tokenizer_for(stem), chat_format(stem))
        ).exact_history
        for stem in FORMATS
    )
    options = {"chat_template": template.jinja, "tokenize": True, "return_dict": False}
    turn = Turn(f"{IMAGE_TOKEN}\nWhat is this?", "A dog.")
    found = own.apply_chat_template(messages([turn], with_answer=False), **options)
    image_id = own.convert_tokens_to_ids(IMAGE_TOKEN)
    assert found == expected_ids(chat.encode_prompt(turn.question, theirs, V), image_id)
    encoded = chat.encode(Sample("s", ("x",), (turn,)), theirs, V, 10_000)
    assert own.apply_chat_template(messages([turn]), **options) != expected_ids(encoded, image_id)


def test_a_tokenizer_that_has_an_image_token_is_refused() -> None:
    chat = chat_format("gemma_2")
    with pytest.raises(ConfigError, match="of its own"):
        with_image_token(with_image_token(tokenizer_for("gemma_2"), chat), chat)
