"""The chat as a page for the browser, served by gradio on this machine. Nothing is sent anywhere else."""

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morebench.chat_terminal import Session
from morebench.errors import EXIT_DONE, MorebenchError, RunError
from morebench.evaluation.conversation import DESCRIBE
from morebench.evaluation.items import StoredImage, image_file
from morebench.evaluation.panel import Panel

if TYPE_CHECKING:
    import gradio

_Messages = list[dict[str, str]]


class _Visit(Session):
    """What one open page has asked."""

    is_stopped = False  # set by another thread

    def asking(self, question: str) -> Iterator[tuple[str, list[_Messages]]]:
        """The question to every member: what there is to say, and every chat, as far as they are."""
        self.is_stopped = False
        question = question.strip() or (DESCRIBE if self.image else "")
        notices: list[str] = []
        for number, label in enumerate(self.labels()):
            chats = self._chats()
            for chat in chats[number:]:
                chat.append({"role": "user", "content": question})
            answer = {"role": "assistant", "content": ""}
            chats[number].append(answer)
            try:
                with closing(self.ask(number, question)) as pieces:
                    for piece in pieces:
                        answer["content"] += piece
                        yield "\n".join(notices), chats
                        if self.is_stopped:
                            break
                notice = self.conversations[number].notice
            except MorebenchError as error:
                notice = str(error)
            if notice is not None:
                notices.append(f"{label}: {notice}")
        yield "\n".join(notices), self._chats()

    def _chats(self) -> list[_Messages]:
        return [
            [
                {"role": role, "content": text}
                for turn in conversation.turns
                for role, text in (("user", turn.question), ("assistant", turn.answer))
            ]
            for conversation in self.conversations
        ]


def serve(panel: Panel, image: StoredImage | None, max_new_tokens: int, host: str, port: int) -> int:
    """Until Ctrl-C. Raises RunError for a port that is taken."""
    for number, member in enumerate(panel.members if panel.holds_all else ()):
        print(f"loading {member.label}", file=sys.stderr)
        panel.load(number)
    with tempfile.TemporaryDirectory(
        prefix="morebench-page-"
    ) as folder:  # where gradio keeps what is uploaded
        page = build_page(panel, image, max_new_tokens, folder)
        address = launch(page, host, port)
        print(f"{address} (Ctrl-C ends)", file=sys.stderr)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        finally:
            page.close(verbose=False)
    return EXIT_DONE


def launch(page: "gradio.Blocks", host: str, port: int) -> str:
    """-> the page's address."""
    import gradio

    no_proxy = [host, "127.0.0.1", "localhost", *filter(None, [os.environ.get("NO_PROXY")])]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(no_proxy)  # gradio asks its own address once
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            footer_links=[],
            ssr_mode=False,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"No page at {host}:{port}: {error}. Choose another with port=... or host=..."
        ) from error
    return str(address)


def build_page(panel: Panel, image: StoredImage | None, max_new_tokens: int, folder: str) -> "gradio.Blocks":
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = folder
    import gradio

    def ask(question: str, path: str | None, visit: _Visit | None) -> Iterator[tuple[Any, ...]]:
        if visit is None:
            try:
                visit = _Visit(panel, image_file(Path(path)) if path else None, max_new_tokens)
            except MorebenchError as error:
                yield question, None, escape(str(error)), *[[] for _ in panel.members]
                return
        for notice, chats in visit.asking(question):
            yield "", visit, escape(notice).replace("\n", "<br>"), *chats

    def stop(visit: _Visit | None) -> None:
        if visit is not None:
            visit.is_stopped = True

    def reset() -> tuple[Any, ...]:
        return None, "", *[[] for _ in panel.members]

    with gradio.Blocks(title="morebench", analytics_enabled=False, fill_width=True) as page:
        visit = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                shown = gradio.Image(
                    value=image.name if image else None,
                    type="filepath",
                    image_mode=None,  # the file as it is
                    sources=["upload", "clipboard"],
                    label="image",
                    height=320,
                    buttons=[],
                )
            with gradio.Column(scale=3):
                with gradio.Row():
                    chats = [
                        gradio.Chatbot(
                            label=member.label,
                            height=480,
                            min_width=240,
                            render_markdown=False,
                            feedback_options=None,
                            buttons=["copy"],
                        )
                        for member in panel.members
                    ]
                notice = gradio.HTML("")
                question = gradio.Textbox(
                    placeholder=DESCRIBE, label="question", submit_btn=True, autofocus=True
                )
                with gradio.Row():
                    stopping = gradio.Button("Stop")
                    resetting = gradio.Button("New conversation")
        question.submit(
            ask,
            [question, shown, visit],
            [question, visit, notice, *chats],
            api_name="ask",
            concurrency_limit=1,
            concurrency_id="models",
            show_progress="hidden",
        )
        stopping.click(stop, [visit], None, queue=False, api_name=False)
        outputs = [visit, notice, *chats]
        resetting.click(reset, None, outputs, api_name=False)
        for changes in (shown.change, *(chat.clear for chat in chats)):
            changes(reset, None, outputs, api_name=False)
    return page
