# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""Templates written from the families' layouts, compared with our formats."""

import copy

import pytest
from factories_data import FORMATS, chat_format, tokenizer_for
from transformers import PreTrainedTokenizerFast

from morebench.data.chat_template import Comparison, compare_with_template, system_text
from morebench.errors import ConfigError

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + "{{ m.content | trim }}<end_of_turn>\n"
    + END
    + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "{{ '<|begin_of_text|>' }}"
    + LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\nDATE{{ m.content | trim }}<|eot_id|>"
    + END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATE = "{% if m.role == 'system' %}Today Date: 26 Jul 2024\n\n{% endif %}"
TEMPLATES = {
    "gemma_2": GEMMA,
    "llama_3": LLAMA.replace("DATE", ""),
    "llama_3_1": LLAMA.replace("DATE", DATE),
    "phi_4": (
        LOOP
        + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
        + END
        + "{{ '<|assistant|>' if add_generation_prompt else '<|endoftext|>' }}"
    ),
    "deepseek_r1": (
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}<｜User｜>{% elif m.role == 'assistant' %}<｜Assistant｜>{% endif %}"
        + "{{ m.content }}{% if m.role == 'assistant' %}<｜end▁of▁sentence｜>{% endif %}"
        + END
        + "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    ),
    "chatml": (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def with_template(stem: str, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer_for(stem))
    tokenizer.chat_template = template
    return tokenizer


def compare(stem: str, template: str | None = None) -> Comparison:
    return compare_with_template(chat_format(stem), with_template(stem, template or TEMPLATES[stem]))


@pytest.mark.parametrize("stem", ["gemma_2", "llama_3", "deepseek_r1", "chatml"])
def test_formats_that_are_their_familys_template(stem: str) -> None:
    found = compare(stem)
    assert found.equal
    assert found.lines() == ["one turn: equal", "two turns: equal", "generation prompt: equal"]


def test_intended_differences_are_shown() -> None:
    phi = compare("phi_4")
    assert not phi.equal
    assert [probe.difference is None for probe in phi.probes] == [False, False, True]
    one = phi.probes[0].difference
    assert one is not None
    assert one.ours.endswith("A cat.<|end|>")
    assert one.theirs == f"{one.ours}<|endoftext|>"
    dates = compare("llama_3_1").probes[0].difference
    assert dates is not None
    assert dates.position == 1 + 1 + len("system") + 1 + 2  # one token a byte, up to the text
    assert dates.ours.endswith("\n\nYou are ")
    assert dates.theirs.endswith("\n\nToday Da")
    assert compare("llama_3_1").lines()[:3] == [
        "one turn: differs from token 11 on",
        f"  ours   {dates.ours!r}",
        f"  theirs {dates.theirs!r}",
    ]


def test_a_template_without_a_system_role() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    found = compare("deepseek_r1", refusing + TEMPLATES["deepseek_r1"])
    assert found.notes == (
        "the template takes no system message (TemplateError: no system role); compared without one",
    )
    assert not found.equal
    # Gemma's format has no system text, so none is passed
    assert compare("gemma_2").notes == ()


def test_a_template_that_fails_is_told_not_raised() -> None:
    found = compare("gemma_2", "{% if not add_generation_prompt %}{{ 1 + 'a' }}{% endif %}x")
    assert not found.equal
    assert found.lines()[0].startswith("one turn: the template refuses it: TypeError: unsupported operand")
    assert found.lines()[2].startswith("generation prompt: differs from token 0 on")


def test_no_template() -> None:
    found = compare_with_template(chat_format("phi_2"), with_template("phi_2", None))
    assert not found.has_template
    assert not found.equal
    assert found.lines() == ["the tokenizer has no chat template to compare with"]


def test_a_format_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not have"):
        compare_with_template(chat_format("gemma_2"), with_template("phi_4", TEMPLATES["phi_4"]))


def test_system_texts() -> None:
    found = {stem: system_text(chat_format(stem)) for stem in (*FORMATS, "plain")}
    assert found["gemma_2"] == found["plain"] == ""
    assert found["phi_4"] == "You are a helpful AI assistant."
    assert found["chatml"] == "You are a helpful assistant."
    assert found["llama_3_1"] == found["llama_3"] == found["deepseek_r1"]
    assert found["llama_3"].startswith("You are a helpful language and vision assistant.")
    assert found["v1"] == found["phi_2"]
