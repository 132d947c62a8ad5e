"""A chat format as the Jinja template that `apply_chat_template` renders: the same ids, by text alone."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from morebench.data.chat import ChatFormat
from morebench.data.records import IMAGE_TOKEN, Turn
from morebench.data.segments import BOS, Segment, text_tokenizer
from morebench.errors import ConfigError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_PLACEHOLDER = re.compile(r"(\{question\}|\{answer\})")
_PROBE = Turn("What is it?", "A red 7, top left.")

# `said.text`: the message's content, images included; `{image}` and the rest are filled in below.
_TEMPLATE = """\
{{- {start} -}}
{%- for message in messages -%}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('Messages must alternate: user, assistant, ... The system text is fixed.') -}}
{%- endif -%}
{%- set said = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set said.text = said.text + {image} -%}
{%- elif part['type'] == 'text' -%}
{%- set said.text = said.text + part['text'] -%}
{%- else -%}
{{- raise_exception('A message holds parts of type text and image, not ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set num_images = said.text.split({image}) | length - 1 -%}
{%- if message['role'] == 'user' -%}
{%- if num_images == 1 -%}
{%- set said.text = ({image} + '\\n' + (said.text | replace({image}, '') | trim)) | trim -%}
{%- endif -%}
{trim}{%- set asked = ({question}) | replace({image}, {image} + {space}) -%}
{{- asked | replace({image} + {space} + ' ', {image} + ' ') -}}
{%- else -%}
{%- if num_images -%}
{{- raise_exception('An answer cannot hold an image.') -}}
{%- endif -%}
{trim}{{- {answer} -}}
{%- endif -%}
{%- endfor -%}
"""
_TRIM = "{%- set said.text = said.text | trim -%}\n"


@dataclass(frozen=True)
class ChatTemplate:
    jinja: str
    exact_history: bool  # False: earlier answers of a conversation get other ids than in training


def chat_template(chat: ChatFormat, tokenizer: "Tokenizer") -> ChatTemplate:
    """What `chat.encode` and `chat.encode_prompt` write, for a tokenizer that adds nothing of its own.

    A user's message is always followed by what opens the answer, whatever `add_generation_prompt` says: a
    format does not say where one ends and the other begins. Raises ConfigError for a format that takes no
    question.
    """
    opening = list(takewhile(lambda segment: "{answer}" not in segment.text, chat.turn))
    rest = chat.turn[len(opening) :]
    if not any("{question}" in segment.text for segment in opening):
        raise ConfigError(f"Chat format {chat.label!r} has no {{question}}, so nobody can chat in it.")
    # A tokenizer that puts a space in front of chunks alone (and of none that begins with one) sees one chunk
    # here, so its spaces are written out.
    space = " " if text_tokenizer(tokenizer).prefixes_chunks_alone else ""
    values = {
        "space": f"'{space}'",
        "start": _expression(chat.start, chat, tokenizer, after_bos=space),
        "question": _expression(opening, chat, tokenizer),
        "answer": _expression(rest, chat, tokenizer),
        "image": f"'{IMAGE_TOKEN}'",
        "trim": _TRIM if chat.trim else "",
    }
    # one pass, so that braces in a format's own texts stay
    jinja = re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], _TEMPLATE)
    return ChatTemplate(jinja, exact_history=_is_exact(opening, rest[0], tokenizer))


def _expression(
    segments: Sequence[Segment], chat: ChatFormat, tokenizer: "Tokenizer", after_bos: str = ""
) -> str:
    """A Jinja expression: literals, with `said.text` where the question or the answer stands."""
    pieces: list[str] = []
    control_ids = chat.control_ids(tokenizer)
    for segment in segments:
        if segment.token is None:
            pieces += _PLACEHOLDER.split(segment.text)
        else:
            pieces += tokenizer.convert_ids_to_tokens(control_ids[segment.token])
            pieces += [after_bos] if segment.token == BOS else []
    terms = [
        "said.text" if _PLACEHOLDER.fullmatch(piece) else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    ]
    return " + ".join(terms) or "''"


def _is_exact(opening: Sequence[Segment], answer: Segment, tokenizer: "Tokenizer") -> bool:
    """Whether prompt and answer as one text have the ids they have as two.

    Not so where GPT-2's way of cutting gives the last of several newlines to what follows them.
    """
    if not opening or opening[-1].token is not None:
        return True
    before, behind = (
        replace(
            segment,
            text=segment.text.replace("{question}", _PROBE.question).replace("{answer}", _PROBE.answer),
        )
        for segment in (opening[-1], answer)
    )
    apart = [
        token for ids, _ in text_tokenizer(tokenizer).encode([before, behind], {}) for token in ids or []
    ]
    return bool(tokenizer(before.text + behind.text, add_special_tokens=False)["input_ids"] == apart)
