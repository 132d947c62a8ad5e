"""A chat on the terminal, and the answers alone for a pipe."""

import io
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from morebench.errors import EXIT_DONE, DataError, MorebenchError
from morebench.evaluation.conversation import DESCRIBE, Conversation
from morebench.evaluation.items import StoredImage, image_file
from morebench.evaluation.panel import Panel

_HELP = """\
/image PATH   start again, about another image
/reset        start again, about the same image
/help         this list
An empty line or Ctrl-D ends. Ctrl-C stops an answer; what was said until then stays."""
_NARROWEST = 36  # letters of a column; with less, answers stand below each other
# A model may say anything, and a terminal obeys control characters.
_HARMLESS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))} | {9: 9, 10: 10}


class Session:
    """One conversation with every member of a panel, all about one image."""

    def __init__(self, panel: Panel, image: StoredImage | None, max_new_tokens: int) -> None:
        self.panel, self.image, self._max_new_tokens = panel, image, max_new_tokens
        self.reset()

    def reset(self) -> None:
        self.conversations = [Conversation(self.image, self._max_new_tokens) for _ in self.panel.members]

    def labels(self) -> list[str]:
        return [member.label for member in self.panel.members]

    def ask(self, number: int, question: str) -> Generator[str, None, None]:
        return self.panel.ask(number, self.conversations[number], question)

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; returns what to tell. Raises DataError."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "/image" and rest.strip():
            self.image = image_file(Path(rest.strip().strip("'\"")).expanduser())
            self.reset()
            return f"about {self.image.name}"
        if verb == "/reset" and not rest:
            self.reset()
            return f"about {self.image.name}" if self.image else "without an image"
        if verb == "/help":
            return _HELP
        raise DataError(f"{line.strip()}: there is /image PATH, /reset and /help.")


def answer(panel: Panel, image: StoredImage | None, prompt: str | None, max_new_tokens: int) -> int:
    """Off a terminal: answers on stdout and nothing else. Raises what ends an answer."""
    session = Session(panel, image, max_new_tokens)
    _take_any_text()
    for question in [prompt] if prompt is not None else _lines(image):
        if question.startswith("/"):
            session.command(question)
            continue
        for number, label in enumerate(session.labels()):
            if len(session.conversations) > 1:
                print(f"{label}:")
            for piece in session.ask(number, question):
                print(piece, end="", flush=True)
            print(flush=True)
            if notice := session.conversations[number].notice:
                print(f"{label}: {notice}", file=sys.stderr)
    return EXIT_DONE


def _lines(image: StoredImage | None) -> Iterator[str]:
    num_questions = 0
    # on a terminal only the answer was redirected: nobody is asked to type
    for line in () if sys.stdin is None or sys.stdin.isatty() else sys.stdin:
        if line.strip():
            num_questions += not line.startswith("/")
            yield line.strip()
    if num_questions == 0:
        if image is None:
            raise DataError(
                'There is nothing to ask about: give image=PATH, prompt="..." or questions as input.'
            )
        yield DESCRIBE


def talk(panel: Panel, image: StoredImage | None, prompt: str | None, max_new_tokens: int) -> int:
    """On a terminal, until an empty line."""
    with suppress(ImportError):  # editing and a history for input(), where the system has it
        import readline  # noqa: F401
    session, console = Session(panel, image, max_new_tokens), Console(highlight=False)
    _take_any_text()
    labels = session.labels()
    for number, label in enumerate(labels if panel.holds_all else []):
        with console.status(f"loading {label}"):
            panel.load(number)
    about = f"about {image.name}" if image else "without an image (/image PATH shows one)"
    console.out(f"{' | '.join(labels)}, {about}. /help lists commands.", style="dim")
    if not panel.holds_all:
        console.out("The GPU does not hold them all at once: each is loaded when it is asked.", style="dim")
    first = prompt or (DESCRIBE if image else None)
    if first is not None:
        console.out(f"> {first}")
        _show(session, first, console)
    while (line := _read()) is not None:
        try:
            if line.startswith("/"):
                console.out(session.command(line), style="dim")
            else:
                _show(session, line, console)
        except DataError as error:
            console.out(str(error), style="red")
    return EXIT_DONE


def _read() -> str | None:
    try:
        return input("> ").strip() or None
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _show(session: Session, question: str, console: Console) -> None:
    labels = session.labels()
    if len(labels) > 1 and console.width >= _NARROWEST * len(labels):
        _show_columns(session, question, console)
        return
    for number, label in enumerate(labels):
        if len(labels) > 1:
            console.out(label, style="bold")
        for text, style in _told(session, number, question):
            console.out(text, end="", style=style)
        console.out("")


def _show_columns(session: Session, question: str, console: Console) -> None:
    labels = session.labels()
    cells = [Text() for _ in labels]

    def table() -> Table:
        table = Table(box=box.SIMPLE_HEAD, expand=True)
        for label in labels:
            table.add_column(Text(label), ratio=1, overflow="fold")
        table.add_row(*cells)
        return table

    with Live(console=console, get_renderable=table, refresh_per_second=8):
        for number, cell in enumerate(cells):
            for text, style in _told(session, number, question):
                cell.append(text, style)


def _told(session: Session, number: int, question: str) -> Iterator[tuple[str, str | None]]:
    """What a member says, then what there is to say about it; with styles."""
    said = ""
    try:
        with closing(session.ask(number, question)) as pieces:
            for piece in pieces:
                said += piece
                yield piece.translate(_HARMLESS), None
        note = session.conversations[number].notice
    except KeyboardInterrupt:
        note = "stopped"
    except MorebenchError as error:
        yield str(error), "red"
        return
    if note is not None:
        yield f"{' ' if said else ''}[{note}]", "dim"


def _take_any_text() -> None:
    """What is no text of this terminal's encoding is refused or shown as such, and ends nothing."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
