"""MMBench's judges: what they are asked, and an endpoint that is slow, broken, closed or talks rubbish."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from morebench.config.schema import Profile
from morebench.errors import EXIT_FAILED, EXIT_USER, ConfigError, JudgeError
from morebench.evaluation.judge import KEY_VARIABLES, Endpoint, Replies
from morebench.evaluation.scoring import score_items
from morebench.evaluation.tasks.mmbench import MMBench

KEY = "sk-very-secret"
Reply = tuple[int, bytes]


def said(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Stub:
    """An endpoint that answers with `reply(prompt, number of the request)`."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        self.prompts: list[str] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []  # Authorization, body
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    stub.prompts.append(prompt)
                    stub.requests.append((self.headers.get("Authorization", ""), body))
                    number = len(stub.prompts)
                status, content = reply(prompt, number)
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


Serve = Callable[[Callable[[str, int], Reply]], Stub]


@pytest.fixture
def serve() -> Iterator[Serve]:
    stubs: list[Stub] = []

    def start(reply: Callable[[str, int], Reply]) -> Stub:
        stubs.append(Stub(reply))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.server.shutdown()
        stub.server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLES[0], KEY)
    monkeypatch.setenv(KEY_VARIABLES[1], "sk-another")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def endpoint(stub: Stub, timeout_s: float = 10.0) -> Endpoint:
    return Endpoint(stub.url, "stub", timeout_s, pause_s=0.0)


def question(base: int, *answers: str) -> list[tuple[str, dict[str, Any]]]:
    """Rotations of a question about four fruits; the right one is A, then B, ..."""
    fruits = ["apple", "banana", "cherry", "damson"]
    rows = []
    for turn, answer in enumerate(answers):
        turned = fruits[-turn:] + fruits[:-turn] if turn else fruits
        record = dict(zip("ABCD", turned, strict=True)) | {"index": base + turn * 1_000_000}
        text = f"Which fruit, {base}"
        rows.append(
            (answer, {**record, "question": text, "hint": "nan", "answer": "ABCD"[turn], "category": "c"})
        )
    return rows


def judged(url: str, rows: list[tuple[str, dict[str, Any]]], path: Path | None = None) -> Any:
    benchmark = MMBench("en", "openai", url, "stub")
    items = score_items(benchmark, rows, Profile.paper, path)
    return benchmark.aggregate(items, Profile.paper), items


def test_only_rows_that_decide_their_question_are_asked_about(serve: Serve, tmp_path: Path) -> None:
    def reply(prompt: str, _: int) -> Reply:
        return said("B" if "Answer: the long one" in prompt else "E. None of them")

    stub = serve(reply)
    rows = [
        *question(1, "A", "the long one"),  # unread and right, says the judge
        *question(2, "C", "the long one"),  # wrong anyway
        *question(3, "???", "!!!"),  # wrong at the first of the two
        *question(4, "A", "B"),
    ]
    metrics, items = judged(stub.url, rows, tmp_path / "judge" / "mmbench.jsonl")
    assert metrics["gpt_eval_score"] == 50.0
    assert metrics["unresolved_rows"] == 4
    asked = sorted(prompt[prompt.index("Question: Which fruit") :] for prompt in stub.prompts)
    assert [text.splitlines()[0] for text in asked] == [
        "Question: Which fruit, 1?",
        "Question: Which fruit, 3?",
    ]
    assert "A. damson\nB. apple\nC. banana\nD. cherry\nAnswer: the long one\nReply:" in asked[0]
    assert [item.parsed for item in items] == ["A", "B", "C", None, "E", None, "A", "B"]
    assert not any("needs_judge" in item.flags for item in items)
    authorization, body = stub.requests[0]
    assert authorization == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("stub", 0, 256)


def test_replies_are_kept_and_nothing_is_asked_twice(serve: Serve, tmp_path: Path) -> None:
    stub, path = serve(lambda *_: said("(A)")), tmp_path / "judge.jsonl"
    rows = question(1, "it is that one", "B")
    first = judged(stub.url, rows, path)
    stub.server.shutdown()
    path.write_text('{"key": "cut sh\n' + path.read_text())  # a damaged line costs no other
    assert judged("http://127.0.0.1:9/v1", rows, path) == first
    assert len(stub.prompts) == 1
    assert KEY not in path.read_text()


def test_a_reply_that_names_no_letter_is_asked_for_three_times(serve: Serve, tmp_path: Path) -> None:
    stub = serve(lambda *_: said("apple or banana"))
    metrics, items = judged(stub.url, question(1, "???", "B"), tmp_path / "judge.jsonl")
    assert len(stub.prompts) == 3
    assert metrics["gpt_eval_score"] == 0.0
    assert items[0].flags == ("unparsed", "needs_judge")  # wrong, and no luck


@pytest.mark.parametrize(
    "bad",
    [(500, b"oops"), (429, b""), (200, b"<html>"), (200, b'{"choices": []}'), said("  ")],
    ids=["500", "429", "html", "no choice", "blank"],
)
def test_a_failing_attempt_is_repeated(serve: Serve, bad: Reply) -> None:
    stub = serve(lambda _, number: said("C") if number > 3 else bad)
    assert Replies(endpoint(stub), None).ask(["x"]) == ["C"]
    assert len(stub.prompts) == 4


def test_a_judge_out_of_reach_is_an_error_that_keeps_what_was_said(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "judge.jsonl"
    stub = serve(lambda prompt, _: said("A") if prompt == "good" else (503, KEY.encode()))
    with pytest.raises(JudgeError, match="can't be reached: status 503, after 5 attempts") as caught:
        Replies(endpoint(stub), path).ask(["good", "bad"])
    assert caught.value.exit_code == EXIT_FAILED  # worth a retry
    assert "1 of 2 questions to it are open" in str(caught.value)
    mended = serve(lambda *_: said("B"))
    assert Replies(endpoint(mended), path).ask(["good", "bad"]) == ["A", "B"]
    assert mended.prompts == ["bad"]
    told = "".join([str(caught.value), caplog.text, *capfd.readouterr(), path.read_text()])
    assert KEY not in told


@pytest.mark.parametrize("status", [400, 401, 307])
def test_a_judge_that_refuses_is_the_users_to_mend(serve: Serve, status: int) -> None:
    stub = serve(lambda *_: (status, KEY.encode()))
    with pytest.raises(ConfigError, match=f"refuses: status {status}") as caught:
        Replies(endpoint(stub), None).ask([str(number) for number in range(100)])
    assert caught.value.exit_code == EXIT_USER
    assert KEY not in str(caught.value)
    assert (KEY_VARIABLES[0] in str(caught.value)) == (status == 401)
    assert len(stub.prompts) < 100  # the first refusal stops the others


def test_a_slow_judge_and_no_judge_at_all_are_out_of_reach(serve: Serve) -> None:
    release = threading.Event()

    def slow(*_: Any) -> Reply:
        release.wait(10)
        return said("A")

    with pytest.raises(JudgeError, match="Timeout"):
        Replies(endpoint(serve(slow), timeout_s=0.05), None).ask(["x"])
    release.set()
    with pytest.raises(JudgeError, match="ConnectionError"):
        Replies(Endpoint("http://127.0.0.1:9/v1", "stub", pause_s=0.0), None).ask(["x"])


def test_a_key_that_no_header_can_hold_does_not_leak(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLES[0], f"{KEY}\nX: ü☃")
    with pytest.raises(JudgeError) as caught:
        Replies(endpoint(serve(lambda *_: said("A"))), None).ask(["x"])
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_line_cut_short_is_asked_again(serve: Serve, tmp_path: Path) -> None:
    stub, path = serve(lambda *_: said("D")), tmp_path / "judge.jsonl"
    Replies(endpoint(stub), path).ask(["one", "two"])
    path.write_bytes(path.read_bytes()[:-5])
    assert Replies(endpoint(stub), path).ask(["one", "two"]) == ["D", "D"]
    assert len(stub.prompts) == 3
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()] == ["D", "D"]


@pytest.mark.parametrize(
    "url",
    ["api.openai.com/v1", "ftp://x/v1", "https://me:pw@x/v1", "https://x/v1?api_key=1", "http://x:p/v1"],
)
def test_a_url_that_is_none_or_carries_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="judge_url must be"):
        MMBench("en", "openai", url, "stub")
    with pytest.raises(ConfigError, match="needs judge_url and judge_model"):
        MMBench("en", "openai", "https://x/v1")


def test_without_a_judge_open_rows_are_wrong_and_counted() -> None:
    rows = [*question(1, "A", "???"), *question(2, "???", "C")]
    benchmark = MMBench("en")
    items = score_items(benchmark, rows, Profile.paper)
    assert [item.flags for item in items] == [(), ("unparsed", "needs_judge"), ("unparsed",), ()]
    assert "2 of 4 answers (50.0%)" in benchmark.warnings(items)[0]
    assert benchmark.warnings(score_items(benchmark, question(1, "A", "B"), Profile.paper)) == []


def test_a_drawn_letter_is_flagged() -> None:
    items = score_items(MMBench("en", "lmms_random"), question(1, "A", "???", "???"), Profile.paper)
    assert items[1].flags == ("unparsed", "random_fallback")
    # The draws of seed 2680 begin with a wrong one, which leaves the question.
    assert (items[1].score, items[2].parsed, items[2].flags) == (0.0, None, ("unparsed",))
