# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""Every format against its published layout: as golden files, and as the ids of the whole rendered text."""

import copy
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories_data import FORMATS, chat_format, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.errors import ConfigError, DataError

GOLDEN = Path(__file__).parent / "golden" / "chat"
LONG = 100_000
V = 3
SYS = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
SYS_V = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYS}<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>",
)
# The start, and every question with its answer.
RENDERED = {
    "gemma_2": ("<bos>", "<start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n"),
    "phi_4": (
        "<|system|>You are a helpful AI assistant.<|end|>",
        "<|user|>{q}<|end|><|assistant|>{a}<|end|>",
    ),
    "llama_3_1": LLAMA,
    "llama_3": LLAMA,
    "deepseek_r1": (f"<｜begin▁of▁sentence｜>{SYS}", "<｜User｜>{q}<｜Assistant｜>{a}<｜end▁of▁sentence｜>"),
    "v1": (f"{SYS_V} ", "USER: {q} ASSISTANT: {a}</s>"),
    "phi_2": (f"{SYS_V} ", "USER: {q} ASSISTANT: {a}<|endoftext|>"),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n",
    ),
    "plain": ("", "<image>{a}\n"),
}
TRIMMED = ("gemma_2", "llama_3_1", "llama_3")
WITH_BOS = ("v1", "plain")  # the tokenizer writes it: it stands in no rendered text


def golden(stem: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{stem}.json").read_text())


def spell(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    """Every byte that the ids stand for; a decoder would take the first space off Vicuna's."""
    if "<0x0A>" not in tokenizer.get_vocab():
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    pieces = [re.sub(r"^<0x(..)>$", r"\1", token) for token in tokenizer.convert_ids_to_tokens(ids)]
    spelt = b"".join(
        bytes.fromhex(piece) if piece != token else piece.replace("▁", " ").encode()
        for piece, token in zip(pieces, tokenizer.convert_ids_to_tokens(ids), strict=True)
    )
    return spelt.decode()


def spelt_pieces(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, num_visual_tokens: int) -> list[Any]:
    """[text, trained] of every run of tokens, visual tokens written as <image>."""
    pieces = []
    for trained, run in groupby(range(len(encoded.input_ids)), lambda at: bool(encoded.supervised[at])):
        text = ""
        for visual, positions in groupby(run, lambda at: bool(encoded.visual_mask[at])):
            found = list(positions)
            assert not visual or len(found) % num_visual_tokens == 0
            text += (
                IMAGE_TOKEN * (len(found) // num_visual_tokens)
                if visual
                else spell(tokenizer, encoded.input_ids[found])
            )
        pieces.append([text, trained])
    return pieces


def rendered_cases(chat: ChatFormat, content: dict[str, Any]) -> list[Any]:
    """(pieces, truncated) of every case."""
    tokenizer, num_visual_tokens = tokenizer_for(content["tokenizer"]), content["visual_tokens"]
    found = []
    for case in content["cases"]:
        num_images = sum(question.count(IMAGE_TOKEN) for question, _ in case["turns"])
        sample = Sample("s", ("x.png",) * num_images, tuple(Turn(*turn) for turn in case["turns"]))
        encoded = chat.encode(sample, tokenizer, num_visual_tokens, case.get("max_length", LONG))
        found.append((spelt_pieces(encoded, tokenizer, num_visual_tokens), encoded.truncated))
    return found


def expected_cases(content: dict[str, Any]) -> list[Any]:
    return [(case["pieces"], "max_length" in case) for case in content["cases"]]


@pytest.mark.parametrize("stem", RENDERED)
def test_golden_samples(stem: str) -> None:
    content = golden(stem)
    found = rendered_cases(chat_format(stem), content)
    for case, expected, rendered in zip(content["cases"], expected_cases(content), found, strict=True):
        assert rendered == expected, case["name"]


def changed_formats(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every small change of a format file that still reads as one."""
    for part in ("start", "turn"):
        for at, segment in enumerate(raw.get(part) or []):
            changes: list[list[dict[str, Any]]] = [[], [segment, segment]]  # left out; twice
            if "text" in segment:
                changes += [
                    [segment | {"text": segment["text"] + "."}],
                    [segment | {"text": "." + segment["text"]}],
                ]
            changes.append([segment | {"trained": not segment.get("trained", False)}])
            for change in changes:
                other = copy.deepcopy(raw)
                other[part][at : at + 1] = change
                yield other
    yield raw | {"trim": not raw.get("trim", False)}


@pytest.mark.parametrize("stem", RENDERED)
def test_no_change_of_a_format_file_goes_unseen(stem: str) -> None:
    content = golden(stem)
    for other in changed_formats(load_chat_format(stem)):
        try:
            found = rendered_cases(ChatFormat.from_dict(other), content)
        except (ConfigError, DataError):
            continue
        assert found != expected_cases(content), other


blanks = st.text(" \n\t\r\v\f\x1c\x85\xa0\u2003\u2028\u3000\u200b", max_size=3)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="<｜")  # no control token spelt out
words = st.text(letters, max_size=6) | st.sampled_from(["on", "a", "An apple", "Sam"])
text = st.lists(st.one_of(blanks, words), max_size=6).map("".join)


def published_ids(stem: str, sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The whole rendered text, split at <image>; the tokenizer parses the control tokens of every chunk."""
    rendered, turn = RENDERED[stem]
    for said in sample.turns:
        values = {"{q}": said.question, "{a}": said.answer}
        if stem in TRIMMED:
            values = {key: value.strip() for key, value in values.items()}
        rendered += re.sub(r"\{[qa]\}", lambda match, values=values: values[match.group()], turn)
    bos = [tokenizer.bos_token_id] if stem in WITH_BOS else []
    first, *others = (
        tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in rendered.split("<image>")
    )
    return [*bos, *first, *(token for chunk in others for token in [*[0] * V, *chunk])]


@st.composite
def samples(draw: st.DrawFn, stem: str) -> Sample:
    turns = []
    for _ in range(1 if stem == "plain" else draw(st.integers(1, 3))):
        question, answer = draw(text), draw(text)
        if stem == "plain" or draw(st.booleans()):
            question = f"<image>\n{question.strip()}".strip()
        if stem == "chatml":
            # the tokenizer would merge it with the newline that a generation prompt ends with
            answer = answer.lstrip()
        turns.append(Turn(question, answer if answer.strip() else "on"))  # see the test below
    num_images = sum(turn.question.count(IMAGE_TOKEN) for turn in turns)
    return Sample("s", ("x.png",) * num_images, tuple(turns))


TOKENIZERS = [(stem, stem, "prepend") for stem in FORMATS] + [("v1", "v1", "always"), ("v1", "v1", "first")]
TOKENIZERS += [("plain", stem, "prepend") for stem in ("gemma_2", "v1")] + [("plain", "v1", "first")]


@pytest.mark.parametrize("swallows", ["", "right", "both"])
@pytest.mark.parametrize(("stem", "family", "prefix"), TOKENIZERS)
@given(data=st.data(), merges=st.booleans())
@settings(max_examples=15, deadline=None)
def test_ids_are_those_of_the_whole_rendered_text(
    stem: str, family: str, prefix: str, swallows: str, data: st.DataObject, merges: bool
) -> None:
    sample = data.draw(samples(stem))
    tokenizer = tokenizer_for(family, swallows, merges, prefix)
    chat = chat_format(stem)
    encoded = chat.encode(sample, tokenizer, V, LONG)
    assert encoded.input_ids.tolist() == published_ids(stem, sample, tokenizer)
    prompt = chat.encode_prompt(sample.turns[0].question, tokenizer, V)
    size = len(prompt.input_ids)
    np.testing.assert_array_equal(prompt.input_ids, encoded.input_ids[:size])
    assert not prompt.supervised.any()
    assert encoded.supervised[size]


@pytest.mark.parametrize("stem", FORMATS)
@pytest.mark.parametrize("swallows", ["right", "both"])
@pytest.mark.parametrize("answer", ["", "  ", "\n x \n", "x"])
def test_end_marks_are_trained_and_prompts_hold_whatever_is_swallowed(
    stem: str, swallows: str, answer: str
) -> None:
    chat, tokenizer = chat_format(stem), tokenizer_for(stem, swallows)
    encoded = chat.encode(Sample("s", (), (Turn("q", answer),)), tokenizer, V, LONG)
    prompt = chat.encode_prompt("q", tokenizer, V).input_ids
    np.testing.assert_array_equal(prompt, encoded.input_ids[: len(prompt)])
    [trained] = [piece for piece, trained in spelt_pieces(encoded, tokenizer, V) if trained]
    end = chat.end_token_ids(tokenizer)[0]
    assert end in encoded.input_ids[encoded.supervised]
    kept = answer.strip() if swallows == "both" else answer.lstrip()
    assert trained.strip() == (kept.strip() if stem in TRIMMED else kept) + spell(tokenizer, [end])


def test_white_space_behind_a_swallowing_token_is_gone() -> None:
    chat, tokenizer = chat_format("phi_4"), tokenizer_for("phi_4", "right")
    encoded = chat.encode(Sample("s", (), (Turn(" \n q ", " a "),)), tokenizer, V, LONG)
    assert spelt_pieces(encoded, tokenizer, V) == [
        ["<|system|>You are a helpful AI assistant.<|end|><|user|>q <|end|><|assistant|>", False],
        ["a <|end|>", True],
    ]


def test_swallowed_text_that_a_format_trains_is_an_error() -> None:
    chat_format("gemma_2").check(tokenizer_for("gemma_2"))
    with pytest.raises(ConfigError, match=r"'Gemma-2' trains the text '\\n' .* swallow .* leave ''\. Take"):
        chat_format("gemma_2").check(tokenizer_for("gemma_2", "right"))
    # what is not trained may go: the LLM has never seen it
    for stem in FORMATS:
        if stem != "gemma_2":
            chat_format(stem).check(tokenizer_for(stem, "both"))


@pytest.mark.parametrize("prefix", ["prepend", "always", "first"])
def test_a_chunk_that_starts_with_a_newline(prefix: str) -> None:
    """Vicuna's tokenizer puts its space in front of every chunk, and as "first" nowhere else."""
    tokenizer = tokenizer_for("v1", "", False, prefix)
    sample = Sample("s", ("x.png",), (Turn("<image>\nq", "a"), Turn("r", "b")))
    encoded = chat_format("v1").encode(sample, tokenizer, V, LONG)
    asked, answer, again, _ = (piece for piece, _ in spelt_pieces(encoded, tokenizer, V))
    assert asked.endswith("USER: <image> \nq ASSISTANT:")
    assert answer == " a</s>"
    assert again == ("USER: r ASSISTANT:" if prefix == "first" else " USER: r ASSISTANT:")
