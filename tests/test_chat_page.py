"""The page of a chat, asked as a browser asks it."""

import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from morebench import chat_page
from morebench.data.records import Turn
from morebench.errors import DataError, RunError
from morebench.evaluation.conversation import DESCRIBE, Conversation
from morebench.evaluation.items import image_file
from morebench.evaluation.panel import Member, Panel

pytest.importorskip("gradio", reason="gradio is not installed: it is the extra `page`")


class Echo(Panel):
    """Says how often it was asked and about what; its second member has no room for a second question."""

    def ask(self, number: int, conversation: Conversation, question: str) -> Generator[str, None, None]:
        if number == 1 and conversation.turns:
            raise DataError("no room for <a second question>")
        said = [f"{len(conversation.turns)} ", "without" if conversation.image is None else "with", " image"]
        yield from said
        conversation.turns.append(Turn(question, "".join(said)))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "grey.png"
    Image.linear_gradient("L").save(path)
    return path


@pytest.fixture(scope="module")
def address(picture: Path) -> Iterator[str]:
    members: Any = [Member(label, None, picture.parent) for label in ("first", "second")]  # type: ignore[arg-type]
    panel = Echo(members, torch.device("cpu"))
    page = chat_page.build_page(panel, image_file(picture), 10, str(picture.parent / "uploads"))
    address = chat_page.launch(page, "127.0.0.1", free_port())
    yield address
    page.close(verbose=False)


def test_a_page_keeps_its_conversations_and_shows_what_went_wrong(address: str, picture: Path) -> None:
    from gradio_client import Client, handle_file

    def texts(chat: list[dict[str, Any]]) -> list[str]:
        return [part["text"] for message in chat for part in message["content"]]

    client = Client(address, verbose=False, analytics_enabled=False)
    _, notice, *chats = client.predict("", handle_file(picture), api_name="/ask")
    assert [texts(chat) for chat in chats] == [[DESCRIBE, "0 with image"]] * 2
    assert notice == ""
    _, notice, *chats = client.predict("Why?", handle_file(picture), api_name="/ask")
    assert texts(chats[0]) == [DESCRIBE, "0 with image", "Why?", "1 with image"]
    assert texts(chats[1]) == [DESCRIBE, "0 with image"]
    assert notice == "second: no room for &lt;a second question&gt;"
    other = Client(address, verbose=False, analytics_enabled=False)
    _, _, *chats = other.predict("Why?", None, api_name="/ask")
    assert texts(chats[0]) == ["Why?", "0 without image"], "another page is another conversation"


def test_a_port_that_is_taken_is_told(address: str, picture: Path) -> None:
    panel = Echo([Member("first", None, picture.parent)], torch.device("cpu"))  # type: ignore[arg-type]
    page = chat_page.build_page(panel, None, 10, str(picture.parent / "uploads"))
    with pytest.raises(RunError, match=r"Choose another with port="):
        chat_page.launch(page, "127.0.0.1", int(address.strip("/").rpartition(":")[2]))
