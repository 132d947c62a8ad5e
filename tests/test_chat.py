# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""What is asked of every chat format, on tokenizers that carry the families' real control tokens."""

import copy
import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from factories_data import FORMATS, chat_format, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st

from morebench.data.batch import collate
from morebench.data.chat import ChatFormat, Counts, Encoded
from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.errors import ConfigError, DataError
from morebench.evaluation.model import LoadedModel

V = 3  # visual tokens per image
LONG = 100_000
DIFFERENT_FORMATS = [stem for stem in FORMATS if stem != "llama_3"]  # the same as llama_3_1
END_MARKS = {
    "gemma_2": "<end_of_turn>\n",
    "phi_4": "<|end|>",
    "llama_3_1": "<|eot_id|>",
    "llama_3": "<|eot_id|>",
    "deepseek_r1": "<｜end▁of▁sentence｜>",
    "v1": "</s>",
    "phi_2": "<|endoftext|>",
    "chatml": "<|im_end|>",
}
CONTROLS = [
    "<|end|>",
    "<|eot_id|>",
    "<end_of_turn>\n",
    "</s>",
    "<|endoftext|>",
    "<｜Assistant｜>",
    "<bos>",
    "USER:",
]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# what breaks parsers: control tokens spelt out, role names, separators
text = st.lists(
    st.one_of(words, st.sampled_from([*CONTROLS, "model\n", "###", "{answer}", "{question}", " "]))
)
plain_text = text.map("".join).map(lambda string: string.replace(IMAGE_TOKEN, ""))
answers = st.one_of(text.map("".join), st.just(f"write {IMAGE_TOKEN} here"))  # there it is only text


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    turns, num_images = [], 0
    for _ in range(draw(st.integers(1, 3))):
        chunks = draw(st.lists(plain_text, min_size=1, max_size=3))
        question = IMAGE_TOKEN.join(chunks)
        num_images += question.count(IMAGE_TOKEN)
        turns.append(Turn(question, draw(answers)))
    return Sample("s", tuple(f"{number}.png" for number in range(num_images)), tuple(turns))


def encode(stem: str, sample: Sample, max_length: int = LONG) -> Encoded:
    return chat_format(stem).encode(sample, tokenizer_for(stem), V, max_length)


def decode(stem: str, ids: Any) -> str:
    return tokenizer_for(stem).decode(ids, clean_up_tokenization_spaces=False)


def ask(question: str, *rest: str) -> Sample:
    """A sample of question, answer, question, answer, ..."""
    texts = [question, *rest]
    images = tuple("x.png" for _ in range(sum(text.count(IMAGE_TOKEN) for text in texts[::2])))
    turns = tuple(Turn(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True))
    return Sample("s", images, turns)


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@given(sample=samples())
@settings(max_examples=30, deadline=None)
def test_the_prompt_is_how_the_training_ids_begin(stem: str, sample: Sample):
    whole = encode(stem, sample)
    for at, turn in enumerate(sample.turns):
        before = sample.turns[:at]
        prompt = chat_format(stem).encode_conversation(before, turn.question, tokenizer_for(stem), V)
        size = len(prompt.input_ids)
        np.testing.assert_array_equal(prompt.input_ids, whole.input_ids[:size])
        np.testing.assert_array_equal(prompt.visual_mask, whole.visual_mask[:size])
        assert prompt.supervised.any() == (at > 0)
        assert whole.supervised[size]  # and not one token earlier: the answer, or its end mark, comes next
        if at == 0:
            opening = chat_format(stem).encode_prompt(turn.question, tokenizer_for(stem), V)
            np.testing.assert_array_equal(opening.input_ids, prompt.input_ids)


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@given(sample=samples())
@settings(max_examples=30, deadline=None)
def test_only_answers_and_end_marks_are_supervised(stem: str, sample: Sample):
    encoded = encode(stem, sample)
    runs = [decode(stem, ids) for ids in supervised_runs(encoded)]
    trim = stem in ("gemma_2", "llama_3_1", "llama_3")
    space = " " if stem == "phi_2" else ""
    said = [turn.answer.strip() if trim else turn.answer for turn in sample.turns]
    assert runs == [f"{space}{answer}{END_MARKS[stem]}" for answer in said]


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@given(sample=samples())
@settings(max_examples=30, deadline=None)
def test_every_image_opens_its_visual_tokens(stem: str, sample: Sample):
    encoded = encode(stem, sample)
    assert encoded.visual_mask.sum() == V * len(sample.images)
    assert not (encoded.visual_mask & encoded.supervised).any()
    assert (encoded.input_ids[encoded.visual_mask] == 0).all()
    assert len(encoded.input_ids) == len(encoded.supervised) == len(encoded.visual_mask)


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@given(sample=samples())
@settings(max_examples=30, deadline=None)
def test_control_tokens_come_from_the_format_alone(stem: str, sample: Sample):
    """A control token that a user spells out stays text."""
    tokenizer = tokenizer_for(stem)
    control = list(tokenizer.get_added_vocab().values())
    blank = Sample("s", (), tuple(Turn("", "") for _ in sample.turns))
    used = encode(stem, sample)
    ids = used.input_ids[~used.visual_mask]
    blank_ids = encode(stem, blank).input_ids
    assert [i for i in ids if i in control] == [i for i in blank_ids if i in control]


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@given(sample=samples(), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_long_samples_lose_their_end_and_never_a_visual_token(stem: str, sample: Sample, share: float):
    whole = encode(stem, sample)
    max_length = max(1, round(share * len(whole.input_ids)))
    if whole.visual_mask[max_length:].any():
        with pytest.raises(DataError, match="visual tokens do not fit"):
            encode(stem, sample, max_length)
        return
    cut = encode(stem, sample, max_length)
    assert cut.truncated == (max_length < len(whole.input_ids))
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:max_length])
    np.testing.assert_array_equal(cut.supervised, whole.supervised[:max_length])


def supervised_runs(encoded: Encoded) -> list[np.ndarray]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.supervised.astype(int), [0]])))
    return [encoded.input_ids[a:b] for a, b in edges.reshape(-1, 2)]


def test_vicuna_puts_a_space_before_its_answers():
    encoded = encode("v1", ask("Q", "A"))
    tokens = tokenizer_for("v1").convert_ids_to_tokens(encoded.input_ids[encoded.supervised])
    assert tokens == ["▁", "A", "</s>"]


@pytest.mark.parametrize("stem", FORMATS)
@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "  What?<image> ", "<image>What?"])
def test_one_image_goes_in_front_of_its_question(stem: str, question: str):
    expected = encode(stem, ask("<image>\nWhat?", "A"))
    np.testing.assert_array_equal(encode(stem, ask(question, "A")).input_ids, expected.input_ids)


def test_several_images_keep_their_places():
    encoded = encode("phi_4", ask("a<image>b<image>c", "A"))
    tokenizer = tokenizer_for("phi_4")
    a, b, c, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", "<|end|>"])
    start = encoded.input_ids.tolist().index(tokenizer.convert_tokens_to_ids("<|user|>"))
    assert encoded.input_ids[start + 1 : start + 5 + 2 * V].tolist() == [a, *[0] * V, b, *[0] * V, c, end]


@pytest.mark.parametrize("stem", FORMATS)
def test_plain_is_image_and_caption(stem: str):
    tokenizer = tokenizer_for(stem)
    sample = ask("Describe it.\n<image>", "a cat")
    encoded = chat_format("plain").encode(sample, tokenizer, V, LONG)
    has_bos = stem not in ("phi_4", "phi_2", "chatml")  # none, or one that is their EOS and never written
    assert encoded.visual_mask.tolist()[: V + has_bos] == [False] * has_bos + [True] * V
    assert encoded.supervised.tolist() == [False] * (V + has_bos) + [True] * (
        len(encoded.supervised) - V - has_bos
    )
    assert decode(stem, encoded.input_ids[encoded.supervised]) == "a cat\n"
    if has_bos:
        assert encoded.input_ids[0] == tokenizer.bos_token_id
    prompt = chat_format("plain").encode_prompt("<image>", tokenizer, V)
    np.testing.assert_array_equal(prompt.input_ids, encoded.input_ids[: V + has_bos])


def test_plain_refuses_what_has_no_place_for_its_images():
    tokenizer = tokenizer_for("gemma_2")
    for sample in (ask("q", "a"), ask("<image><image>", "a"), ask("<image>", "a", "q", "b")):
        with pytest.raises(DataError, match=r"record id 's': chat format 'plain' makes room for"):
            chat_format("plain").encode(sample, tokenizer, V, LONG)


@pytest.mark.parametrize(
    ("stem", "ends"),
    [
        ("gemma_2", ["<end_of_turn>", "<eos>"]),
        ("phi_4", ["<|end|>", "<|endoftext|>"]),
        # what the study declares as stop tokens: 128009, 128008, 128001
        ("llama_3_1", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
        ("llama_3", ["<|eot_id|>", "<|end_of_text|>"]),
        ("deepseek_r1", ["<｜end▁of▁sentence｜>"]),
        ("chatml", ["<|im_end|>", "<|endoftext|>"]),
        ("v1", ["</s>"]),
    ],
)
def test_end_tokens(stem: str, ends: list[str]):
    tokenizer = tokenizer_for(stem)
    assert chat_format(stem).end_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(ends)
    assert chat_format("plain").end_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("stem", FORMATS)
def test_a_pad_token_that_is_the_end_mark_changes_nothing(stem: str):
    """Labels go by position, not by id."""
    sample = ask("q <image>", "a", "r", "b")
    expected = encode(stem, sample)
    tokenizer = copy.deepcopy(tokenizer_for(stem))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat_format(stem).end_token_ids(tokenizer)[0])
    found = chat_format(stem).encode(sample, tokenizer, V, LONG)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.supervised, expected.supervised)
    pixels = [np.zeros((3, 8, 8), np.float32)] * 2
    batch = collate([found, expected], pixels, [0, 1], 1, 8)
    assert np.count_nonzero(batch.targets.numpy() == tokenizer.pad_token_id) == 4  # two turns in each


def test_a_format_of_another_family_is_refused():
    with pytest.raises(ConfigError, match=r"have: '<bos>', '<start_of_turn>', '<end_of_turn>'\. Choose"):
        chat_format("gemma_2").check(tokenizer_for("phi_4"))
    with pytest.raises(ConfigError, match="'Gemma-2' uses tokens which the tokenizer of this LLM does not"):
        chat_format("gemma_2").encode(ask("q", "a"), tokenizer_for("phi_4"), V, LONG)


TURN: list[dict[str, Any]] = [{"text": "{question}"}, {"text": "{answer}", "trained": True}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"turn": [{"text": "{question}"}]}, "exactly one trained text"),
        ({"turn": [{"text": "{answer}"}]}, "exactly one trained text"),
        ({"turn": [*TURN, TURN[1]]}, "exactly one trained text"),
        ({"turn": [{"text": "{question}", "trained": True}, TURN[1]]}, "untrained text"),
        ({"start": [{"text": "{question}"}]}, "untrained text"),
        ({"turn": [*TURN, {"txt": "x"}]}, "`token: ...` or `text: ...`"),
        ({"turn": [*TURN, {"token": "a", "text": "b"}]}, "`token: ...` or `text: ...`"),
        ({"turn": [*TURN, {"text": "x", "train": True}]}, r"unknown keys \['train'\]"),
        ({"system": "x"}, r"unknown keys \['system'\]"),
        ({"turn": [{"text": "{quest}"}, TURN[1]]}, r"\{quest\} is filled by nothing"),
    ],
)
def test_bad_formats(changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        ChatFormat.from_dict({"label": "X", "turn": TURN} | changes)


@pytest.mark.parametrize(
    ("stem", "prefix"), [*((stem, "prepend") for stem in FORMATS), ("v1", "always"), ("v1", "first")]
)
def test_counts_are_those_of_what_is_encoded(stem: str, prefix: str):
    chat, tokenizer = chat_format(stem), tokenizer_for(stem, "right", merges=True, prefix=prefix)
    control = next(token for token in chat.control_ids(tokenizer) if token != "{bos}")
    samples = [
        Sample("text", (), (Turn("Who?\n\n", " A  on"), Turn(f"{control} {control}", ""), Turn(" ", "A"))),
        Sample("image", ("a.png",), (Turn("<image>\nU on?", f"on {control} on"), Turn("A", "\n\nB"))),
        Sample("two", ("a.png", "b.png"), (Turn("<image> or <image>?", "<image> no"),)),
        Sample("mistaken", ("a.png", "b.png"), (Turn("<image>?", "no"),)),
        Sample("empty", (), (Turn("", ""),)),
    ]
    for max_length in range(1, 120):
        for sample, found in zip(samples, chat.count(samples, tokenizer, 5, max_length), strict=True):
            if isinstance(found, DataError):
                with pytest.raises(DataError, match=re.escape(str(found))):
                    chat.encode(sample, tokenizer, 5, max_length)
                continue
            encoded = chat.encode(sample, tokenizer, 5, max_length)
            predicted = np.count_nonzero(encoded.supervised[1:])
            assert found == Counts(len(encoded.input_ids), predicted, encoded.truncated)


def test_a_cut_right_behind_the_last_visual_token_is_no_mistake():
    chat, tokenizer = chat_format("gemma_2"), tokenizer_for("gemma_2")
    sample = Sample("image", ("a.png",), (Turn("<image>?", "no"),))
    end = int(np.flatnonzero(chat.encode(sample, tokenizer, V, LONG).visual_mask)[-1]) + 1
    assert len(chat.encode(sample, tokenizer, V, end).input_ids) == end
    with pytest.raises(
        DataError, match=rf"do not fit into max_length={end - 1}; the last one is token {end}"
    ):
        chat.encode(sample, tokenizer, V, end - 1)


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
def test_a_prompt_as_written_leaves_its_image_where_it_stands(stem: str):
    chat, tokenizer = chat_format(stem), tokenizer_for(stem)
    question = "Look at <image> and <b>. Which one?"
    written = chat.encode_prompt(question, tokenizer, V, as_written=True)
    words = decode(stem, np.where(written.visual_mask, tokenizer("#").input_ids[-1], written.input_ids))
    # v1's tokenizer puts a space in front of every text
    assert f"Look at {'#' * V} and <b>. Which one?" in words.replace("  ", " ")
    moved = chat.encode_prompt(question, tokenizer, V)
    assert written.visual_mask.argmax() > moved.visual_mask.argmax()


@pytest.mark.parametrize("stem", DIFFERENT_FORMATS)
@pytest.mark.parametrize(
    "question", ["<image>\nWhat is this?\nA. x", "<image> and <image>\nwhich?", "No image.", "<image>"]
)
def test_a_prompt_as_written_is_the_training_prompt_where_nothing_moves(stem: str, question: str):
    chat, tokenizer = chat_format(stem), tokenizer_for(stem)
    written = chat.encode_prompt(question, tokenizer, V, as_written=True)
    moved = chat.encode_prompt(question, tokenizer, V)
    np.testing.assert_array_equal(written.input_ids, moved.input_ids)
    np.testing.assert_array_equal(written.visual_mask, moved.visual_mask)


def test_a_loaded_model_asks_as_written():
    parts = SimpleNamespace(
        chat=chat_format("v1"),
        tokenizer=tokenizer_for("v1"),
        mllm=SimpleNamespace(vision=SimpleNamespace(num_visual_tokens=V)),
    )
    asked = LoadedModel.prompt(cast(LoadedModel, parts), "Look at <image> now.")
    expected = parts.chat.encode_prompt("Look at <image> now.", parts.tokenizer, V, as_written=True)
    np.testing.assert_array_equal(asked.visual_mask, expected.visual_mask)
