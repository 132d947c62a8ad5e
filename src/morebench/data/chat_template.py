"""A chat format beside the chat template that a tokenizer brings along: information, never an error.

Some differences are meant: no date lines for Llama-3.1, no `<|endoftext|>` behind the last turn of Phi-4, and
whatever a template makes of the study's own system text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from morebench.data.chat import ChatFormat
from morebench.data.records import Sample, Turn

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_AROUND = 8  # tokens shown on either side of a difference
_TURNS = (Turn("What is this?", "A cat."), Turn("Is it red?", "No, it is black."))


@dataclass(frozen=True)
class Difference:
    position: int  # of the first token that differs
    ours: str  # decoded, around that token
    theirs: str


@dataclass(frozen=True)
class Probe:
    name: str
    difference: Difference | None  # None: equal, or not rendered
    failure: str | None = None  # what the template said instead of rendering


@dataclass(frozen=True)
class Comparison:
    probes: tuple[Probe, ...]  # empty: the tokenizer has no template
    notes: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        return bool(self.probes)

    @property
    def equal(self) -> bool:
        return self.has_template and all(
            probe.difference is None and probe.failure is None for probe in self.probes
        )

    def lines(self) -> list[str]:
        if not self.has_template:
            return ["the tokenizer has no chat template to compare with"]
        found = list(self.notes)
        for probe in self.probes:
            if probe.failure is not None:
                found.append(f"{probe.name}: the template refuses it: {probe.failure}")
            elif probe.difference is None:
                found.append(f"{probe.name}: equal")
            else:
                found += [
                    f"{probe.name}: differs from token {probe.difference.position} on",
                    f"  ours   {probe.difference.ours!r}",
                    f"  theirs {probe.difference.theirs!r}",
                ]
        return found


def compare_with_template(chat: ChatFormat, tokenizer: "Tokenizer") -> Comparison:
    """One turn, two turns and a generation prompt, in our ids and in those of `tokenizer.chat_template`.

    The system text of `chat`, if any, is passed on as the system message. Raises ConfigError if `chat` does
    not fit the tokenizer.
    """
    if not tokenizer.chat_template:
        return Comparison(())
    system, notes = system_text(chat), []
    messages = [{"role": "system", "content": system}] if system else []
    if messages and (reason := _render(tokenizer, [*messages, *_messages(_TURNS[:1])], False)[1]):
        notes.append(f"the template takes no system message ({reason}); compared without one")
        messages = []
    probes = []
    for name, turns in (("one turn", _TURNS[:1]), ("two turns", _TURNS)):
        ours = chat.encode(Sample("probe", (), tuple(turns)), tokenizer, 0, 2**31 - 1)
        theirs, failure = _render(tokenizer, [*messages, *_messages(turns)], False)
        probes.append(_probe(name, tokenizer, ours.input_ids.tolist(), theirs, failure))
    prompt = chat.encode_prompt(_TURNS[0].question, tokenizer, 0)
    theirs, failure = _render(tokenizer, [*messages, *_messages(_TURNS[:1])[:1]], True)
    probes.append(_probe("generation prompt", tokenizer, prompt.input_ids.tolist(), theirs, failure))
    return Comparison(tuple(probes), tuple(notes))


def system_text(chat: ChatFormat) -> str:
    """What `chat` says before the first turn: the longest of its texts, without a role name in front."""
    longest = max((segment.text for segment in chat.start), key=len, default="")
    return longest.strip().removeprefix("system\n").strip()


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def _render(
    tokenizer: "Tokenizer", messages: list[dict[str, str]], prompt: bool
) -> tuple[list[int], str | None]:
    """-> ids, and why there are none."""
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program of its own, which may fail in any way
        return [], f"{type(error).__name__}: {error}"
    return tokenizer(text, add_special_tokens=False)["input_ids"], None


def _probe(
    name: str, tokenizer: "Tokenizer", ours: list[int], theirs: list[int], failure: str | None
) -> Probe:
    if failure is not None or ours == theirs:
        return Probe(name, None, failure)
    at = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))
    around = slice(max(0, at - _AROUND), at + _AROUND)
    shown = [str(tokenizer.decode(ids[around], clean_up_tokenization_spaces=False)) for ids in (ours, theirs)]
    return Probe(name, Difference(at, *shown))
