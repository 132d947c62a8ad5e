"""The brackets of JSON text: how deep they go, and where an element ends that is not decoded."""

import re

MAX_DEPTH = 100  # a record needs 3; Python's own bound depends on its version and on who calls
_BRACKETS = re.compile(r"[\[{]++|[\]}]++|\"")
_IN_TEXT = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BEHIND_SCALAR = re.compile(r"[,\]} \t\n\r]")


def is_too_deep(element: str) -> bool:
    if element.count("{") + element.count("[") <= MAX_DEPTH:
        return False
    skipper = Skipper()
    skipper.end(element, 0)
    return skipper.deepest > MAX_DEPTH


class Skipper:
    """Goes over an element piece by piece. A bracket counts whether or not it fits the one it closes."""

    def __init__(self) -> None:
        self.depth = 0
        self.deepest = 0
        self.is_scalar = False  # a number or a word, which only what follows can end
        self._begun = False
        self._in_text = False
        self._escaped = False

    def end(self, text: str, at: int) -> int | None:
        """Where in `text` the element ends, which goes on at `at`; None if it does not end there."""
        if at == len(text):
            return None
        if not self._begun:
            self._begun = True
            self.is_scalar = text[at] not in '"[{'
        if self.is_scalar:
            behind = _BEHIND_SCALAR.search(text, at)
            return behind.start() if behind else None
        while at < len(text):
            if self._in_text:
                at = self._over_text(text, at)
            else:
                found = _BRACKETS.search(text, at)
                if found is None:
                    return None
                at = found.end()
                if found[0] == '"':
                    self._in_text = True
                    continue
                if (end := self._over_brackets(found)) is not None:
                    return end
            if self.depth == 0 and not self._in_text:
                return at
        return None

    def _over_text(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _IN_TEXT.match(text, at).end()  # type: ignore[union-attr] # it matches nothing, too
        if at < len(text):  # a quotation mark, or a backslash as the last character
            self._in_text = self._escaped = text[at] == "\\"
            at += 1
        return at

    def _over_brackets(self, found: re.Match[str]) -> int | None:
        number = found.end() - found.start()
        if found[0][0] in "[{":
            self.depth += number
            self.deepest = max(self.deepest, self.depth)
            return None
        if number >= self.depth:
            return found.start() + self.depth
        self.depth -= number
        return None
