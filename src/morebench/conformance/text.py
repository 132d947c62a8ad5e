"""The tokenizer and the chat formats of both train steps."""

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Config, Step
from morebench.conformance.findings import Finding, judged, shown
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.chat_template import compare_with_template
from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.models.flops import llm_shape
from morebench.training.stage import recipe_of

_TEXTS = (
    "A cat, 2 dogs & <b>5</b> birds.",
    "naïve café, 数字 и слова, 😀",
    "x = [1, 2]\n\n\tprint(x)  # two  spaces",
)
_QUESTION, _ANSWER = f"{IMAGE_TOKEN}\nWhat is this?", "A cat."
PROBES = {
    Step.pretrain: Sample("probe", ("probe.png",), (Turn(_QUESTION, _ANSWER),)),
    Step.finetune: Sample(
        "probe", ("probe.png",), (Turn(_QUESTION, _ANSWER), Turn("And its colour?", "Red."))
    ),
}
TEXT_ONLY = Sample("probe without image", (), (Turn("How much is 3 + 4?", "7"), Turn("And 2 + 2?", "4")))


def chat_format(config: Config, step: Step) -> ChatFormat:
    recipe, _ = recipe_of(config, step)
    return ChatFormat.from_dict(load_chat_format(recipe.chat_format or config.llm.chat_format))


def examine_tokenizer(config: Config, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    lost = [text for text in _TEXTS if _round_trip(text, tokenizer) != text]
    yield judged(
        "tokenizer", "round trip", not lost, f"{len(_TEXTS) - len(lost)} of {len(_TEXTS)} texts", "all"
    )
    for name in ("bos", "eos", "pad"):
        token, number = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        yield shown("tokenizer", name.upper(), "none" if token is None else f"{token} ({number})")
    rows, largest = llm_shape(config)["vocab_size"], max(tokenizer.get_vocab().values())
    yield judged(
        "tokenizer",
        "vocabulary",
        largest < rows,
        f"{len(tokenizer)} tokens, largest id {largest}, {rows} rows of embeddings",
        f"an id below {rows}",
    )


def examine_format(
    config: Config, step: Step, tokenizer: PreTrainedTokenizerFast, num_visual_tokens: int
) -> Iterator[Finding]:
    """Spans, prompt and length of one conversation with an image, as this step encodes it."""
    chat, sample, topic = chat_format(config, step), PROBES[step], f"{step.name} text"
    recipe, _ = recipe_of(config, step)
    chat.check(tokenizer)
    encoded = chat.encode(sample, tokenizer, num_visual_tokens, recipe.max_length)
    runs = [_decode(ids, tokenizer) for ids in _supervised_runs(encoded)]
    expected = [_supervised_text(chat, turn.answer) for turn in sample.turns]
    right = [run.strip() for run in runs] == [text.strip() for text in expected]
    shown_runs, shown_expected = (" | ".join(map(repr, texts)) for texts in (runs, expected))
    yield judged(topic, "supervised", right, shown_runs, shown_expected)
    prompt = chat.encode_prompt(sample.turns[0].question, tokenizer, num_visual_tokens)
    size = len(prompt.input_ids)
    same = np.array_equal(prompt.input_ids, encoded.input_ids[:size])
    is_prefix = same and bool(encoded.supervised[size]) and not prompt.supervised.any()
    yield judged(
        topic,
        "prompt",
        is_prefix,
        f"{size} tokens, the beginning of the training ids",
        "the ids up to the answer",
    )
    yield judged(
        topic,
        "length",
        not encoded.truncated,
        f"{len(encoded.input_ids)} of {recipe.max_length} tokens, {num_visual_tokens} of them visual",
        "room for a question and its answer",
    )
    if step is Step.finetune:
        ends = tokenizer.convert_ids_to_tokens(chat.end_token_ids(tokenizer))
        yield shown(topic, "ends an answer", " or ".join(ends))
        yield shown(topic, "own template", "\n".join(compare_with_template(chat, tokenizer).lines()))


def _round_trip(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return _decode(ids, tokenizer)


def _decode(ids: list[int] | np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _supervised_runs(encoded: Encoded) -> list[np.ndarray]:
    edges = np.flatnonzero(np.diff(encoded.supervised, prepend=False, append=False))
    return [encoded.input_ids[start:end] for start, end in list(pairwise(edges))[::2]]


def _supervised_text(chat: ChatFormat, answer: str) -> str:
    trained = [segment for segment in chat.turn if segment.trained]
    return "".join(segment.token or segment.text.replace("{answer}", answer) for segment in trained)
