"""Segments of a chat format become the ids that their whole rendered text has in the family's tokenizer.

The published computation splits a rendered conversation at `<image>` and gives every chunk to the tokenizer,
control tokens parsed. Here every text is tokenized on its own, so that none can forge a control token and no
length arithmetic is needed to find the answers. Two habits of tokenizers reach across and are followed:
control tokens that swallow white space beside them, and a space put in front of texts. One is not: merging
the newline before an answer (ChatML's) with a newline that the answer begins with, because a generation
prompt ends between the two.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Core

from morebench.data.records import IMAGE_TOKEN

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

BOS = "{bos}"
# What tokenizers swallow: `\s` in Rust. Python's own notion of white space has four characters more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclass(frozen=True)
class Segment:
    """Either one control token or a text template."""

    token: str | None
    text: str
    trained: bool


Piece = Segment | None  # None: the visual tokens of one image
# ids of a control token; a text, with whether the tokenizer may put its space in front; None: an image
_Part = list[int] | tuple[bool, str] | None


def split_at_images(segments: Sequence[Segment]) -> list[Piece]:
    """Neighbouring texts are joined first, to be tokenized as one."""
    pieces: list[Piece] = []
    for segment in _join_texts(segments):
        # an image token in an answer is text: nothing would fill it
        if segment.token is not None or segment.trained:
            pieces.append(segment)
            continue
        if IMAGE_TOKEN not in segment.text:
            pieces.append(segment)
            continue
        for number, chunk in enumerate(segment.text.split(IMAGE_TOKEN)):
            if number:
                pieces.append(None)
            pieces.append(replace(segment, text=chunk))
    return pieces


def swallow_spaces(pieces: Sequence[Piece], added: Mapping[str, AddedToken]) -> list[Piece]:
    """The same pieces without white space that control tokens take in (`AddedToken(rstrip=True)`, `lstrip`).

    The family's tokenizer drops it from a whole text, so the LLM has never seen it there.
    """
    kept = list(pieces)
    for at, piece in enumerate(pieces):
        token = added.get(piece.token) if piece is not None and piece.token is not None else None
        if token is not None and token.lstrip:
            _strip(kept, range(at - 1, -1, -1), str.rstrip)
        if token is not None and token.rstrip:
            _strip(kept, range(at + 1, len(kept)), str.lstrip)
    return kept


def _strip(pieces: list[Piece], order: range, strip: Callable[[str, str], str]) -> None:
    was_trained = False
    for at in order:
        piece = pieces[at]
        if piece is None or piece.token is not None:
            return
        # A generation prompt can't know that an empty answer and a swallowing end mark will follow, so the
        # text in front of an answer keeps its end.
        if strip is str.rstrip and was_trained and not piece.trained:
            return
        text = strip(piece.text, _WHITE_SPACE)
        pieces[at] = replace(piece, text=text)
        if text:
            return
        was_trained = piece.trained


class TextTokenizer:
    """Tokenizes a text as what stands in front of it demands."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._tokenizer = tokenizer
        schemes = _prefix_schemes(tokenizer.backend_tokenizer)
        # "always": behind a control token too, as the first Llama tokenizers; "first": where a chunk begins
        self._always = "always" in schemes
        self.prefixes_chunks_alone = bool(schemes) and not self._always
        self._unprefixed = _without_prefix(tokenizer.backend_tokenizer) if schemes else None

    def encode(
        self, pieces: Sequence[Piece], control_ids: Mapping[str, list[int]]
    ) -> list[tuple[list[int] | None, bool]]:
        """-> for every piece or part of one: its ids (None: an image), and whether it is trained."""
        parts = self._cut(pieces, control_ids)
        encoded = self._tokenize(part for part, _ in parts)
        return [(encoded[part].ids if isinstance(part, tuple) else part, trained) for part, trained in parts]

    def count(
        self, samples: Sequence[Sequence[Piece]], control_ids: Mapping[str, list[int]]
    ) -> list[list[tuple[int | None, bool]]]:
        """Of many samples at once: as `encode`, with numbers of ids in place of ids."""
        cut = [self._cut(pieces, control_ids) for pieces in samples]
        encoded = self._tokenize(part for parts in cut for part, _ in parts)
        sizes = {text: len(encoding) for text, encoding in encoded.items()}
        return [
            [
                (sizes[part] if isinstance(part, tuple) else None if part is None else len(part), trained)
                for part, trained in parts
            ]
            for parts in cut
        ]

    def _cut(self, pieces: Sequence[Piece], control_ids: Mapping[str, list[int]]) -> list[tuple[_Part, bool]]:
        # cut apart where they stand in a text: `encode_special_tokens` does not see to those that a tokenizer
        # adds without calling them special, as DeepSeek's role marks
        literal = [token for token in control_ids if token in self.added and not self.added[token].special]
        found: list[tuple[_Part, bool]] = []
        chunk_starts, after_text = True, False
        for piece in pieces:
            if piece is None or piece.token is not None:
                ids = None if piece is None else control_ids[piece.token or ""]
                found.append((ids, piece is not None and piece.trained))
                # a {bos} is no part of the chunk: in the published computation the tokenizer writes it
                chunk_starts, after_text = piece is None or piece.token == BOS, False
                continue
            for text in _defuse(piece.text, literal):
                prefixed = self._unprefixed is None or chunk_starts or (self._always and not after_text)
                found.append(((prefixed, text), piece.trained))
                chunk_starts, after_text = False, True
        return found

    def _tokenize(self, parts: Iterator[_Part]) -> dict[tuple[bool, str], Encoding]:
        """Every text once, and all in one call: a call costs more than a text, and formats repeat theirs."""
        texts = list(dict.fromkeys(part for part in parts if isinstance(part, tuple)))
        encoded: dict[tuple[bool, str], Encoding] = {}
        for prefixed, core in ((True, self._tokenizer.backend_tokenizer), (False, self._unprefixed)):
            group = [text for text in texts if text[0] is prefixed]
            if group and core is not None:
                core.no_truncation()
                core.no_padding()
                core.encode_special_tokens = True  # what looks like one in a text is text
                found = core.encode_batch_fast([text for _, text in group], add_special_tokens=False)
                encoded |= dict(zip(group, found, strict=True))
        return encoded


def _defuse(text: str, tokens: Collection[str]) -> list[str]:
    """Cuts literal control tokens in the text apart. An empty text has no parts."""
    if not tokens or not text:
        return [text] if text else []
    cuts = {0, len(text)}
    for token in tokens:
        if token in text:
            cuts |= {match.start() + 1 for match in re.finditer(re.escape(token), text)}
    return [text[a:b] for a, b in pairwise(sorted(cuts))]


@lru_cache(maxsize=4)
def text_tokenizer(tokenizer: "Tokenizer") -> TextTokenizer:
    return TextTokenizer(tokenizer)


def _prefix_schemes(core: Core) -> set[str]:
    found = set()
    for component in (core.normalizer, core.pre_tokenizer):
        state = json.loads(component.__getstate__()) if component is not None else None
        found |= {_prefix_scheme(part) for part in _parts(state)}
    return found - {"never"}


def _prefix_scheme(part: Mapping[str, Any]) -> str:
    if part["type"] == "Metaspace":
        return part["prepend_scheme"]
    if part["type"] == "Prepend" or (part["type"] == "ByteLevel" and part["add_prefix_space"]):
        return "always"
    return "never"


def _without_prefix(core: Core) -> Core:
    unprefixed: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "Prepend": {"prepend": ""},
        "ByteLevel": {"add_prefix_space": False},
    }
    state = json.loads(core.to_str())
    for part in (*_parts(state["normalizer"]), *_parts(state["pre_tokenizer"])):
        part |= unprefixed.get(part["type"], {})
    return Core.from_str(json.dumps(state))


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as tokenizer.json writes it, and what it is a sequence of."""
    if component is not None:
        yield component
        for inner in component.get("normalizers", component.get("pretokenizers", [])):
            yield from _parts(inner)


def _join_texts(segments: Sequence[Segment]) -> Iterator[Segment]:
    pending: Segment | None = None
    for segment in segments:
        joins = pending is not None and pending.token is None and segment.token is None
        if pending is not None and joins and pending.trained == segment.trained:
            pending = replace(pending, text=pending.text + segment.text)
            continue
        if pending is not None:
            yield pending
        pending = segment
    if pending is not None:
        yield pending
