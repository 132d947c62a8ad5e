"""How MMBench reads an option's letter out of a response."""

from collections.abc import Mapping

LETTERS = "ABCD"  # options there can be
NO_OPTION = "E"  # accepted as an answer, always wrong

_DECORATIONS: tuple[tuple[str, str], ...] = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
)
_DECORATIONS += ((":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))

_OUTER = ",.!?;:'\""
# Weakest first; an answer that begins or ends with its letter is surest.
_RANKS = ("anywhere", "space", ")", ":", ".", "brackets", "phrase", "end", "start")
_PHRASES: tuple[str, ...] = ("answer is", "the answer is", "correct answer is", "the correct answer is")
_PHRASES += ("best answer is", "the best answer is", "my answer is", "correct option is")
_PHRASES += ("the correct option is", "best option is", "the best option is", "choice is", "the choice is")
_PHRASES += ("correct choice is", "the correct choice is", "my choice is", "i choose", "i select", "i pick")
_PHRASES += ("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")


def resolve(response: str, options: Mapping[str, str]) -> str | None:
    """The option a response names, by letter (A to E) or else by text; None if not exactly one."""
    return by_letter(response) or _by_text(response, options)


def by_letter(response: str) -> str | None:
    if "Failed to obtain answer via API" in response:
        return None
    words = response.split()
    letters = LETTERS + NO_OPTION
    plain = [letter for letter in letters if letter in words]
    # In a sentence "A" is an article.
    if len(plain) == 1 and not (plain == ["A"] and len(words) > 3):
        return plain[0]
    for before, after in _DECORATIONS:
        found = [letter for letter in letters if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return None


def _by_text(response: str, options: Mapping[str, str]) -> str | None:
    # The text of a missing option, "nan", takes part, as in the reference.
    found = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return found[0] if len(found) == 1 else None


def guess_letter(response: str) -> str | None:
    """How lmms-eval 0.7.3 reads an unresolved response without a judge: the surest sign, then the last."""
    text = response.strip()
    for character in _OUTER:
        text = text.strip(character)
    bare, text = text.strip(), f" {text} "
    signs: list[tuple[int, int, str]] = []  # rank, position, letter

    def found(sign: str, at: int, letter: str) -> None:
        if at >= 0:
            signs.append((_RANKS.index(sign), at, letter))

    lowered = text.lower()
    after = [at + len(phrase) for phrase in _PHRASES if (at := lowered.find(phrase)) >= 0]
    for letter in LETTERS:
        found("brackets", text.rfind(f"({letter})"), letter)
        for sign in (".", ":", ")"):
            found(sign, text.rfind(letter + sign), letter)
        found("space", text.rfind(f"{letter} "), letter)
        for start in after:
            found("phrase", text.find(letter, start), letter)
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found("start", 0, letter)
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found("end", len(text), letter)
    if not signs:
        for letter in LETTERS:
            found("anywhere", text.rfind(letter), letter)
    return max(signs, key=lambda sign: sign[:2])[2] if signs else None
