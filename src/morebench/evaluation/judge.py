"""Asks an OpenAI-compatible endpoint, several prompts side by side, and keeps what it says.

The key is read from the environment when a request is made; it is in no message, file or config.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import requests

from morebench.errors import ConfigError, JudgeError, MorebenchError
from morebench.training.files import disk_full_named, write_atomically

KEY_VARIABLES = ("MOREBENCH_JUDGE_API_KEY", "OPENAI_API_KEY")
_AT_ONCE = 8
_ATTEMPTS = 5
_LONGEST_PAUSE_S = 60.0
_MAX_TOKENS = 256
_BUSY = (408, 409, 425, 429)  # worth another attempt, as is every 5xx


@dataclass(frozen=True)
class Endpoint:
    """`url`: the API's root, such as https://api.openai.com/v1. Raises ConfigError for what can't be one."""

    url: str
    model: str
    timeout_s: float = 30.0
    pause_s: float = 3.0  # after a failed attempt; doubled after each

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            plain = False
        if not plain or parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                "judge_url must be the root of an OpenAI-compatible API, http(s)://HOST/v1, without user, "
                f"password or query. The key belongs into the environment variable {KEY_VARIABLES[0]}."
            )

    @property
    def shown(self) -> str:
        return f"the judge {self.model} at {self.url}"


class Replies:
    """`ask` gives the replies to prompts, from the file (JSON lines) where it has them."""

    def __init__(self, endpoint: Endpoint, path: Path | None) -> None:
        self._endpoint = endpoint
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None and path.is_file():
            self._read(path)

    def ask(self, prompts: Sequence[str], turn: int = 0) -> list[str]:
        """`turn` tells apart the times one prompt is asked. Raises JudgeError or ConfigError; what was said
        until then is kept."""
        keys = [_key(self._endpoint.model, prompt, turn) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        if missing:
            self._ask(missing, turn)
        return [self._known[key] for key in keys]

    def _ask(self, missing: Mapping[str, str], turn: int) -> None:
        stop = Event()  # after a failure the others need not wait for their turn
        failures: list[MorebenchError] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {pool.submit(_request, self._endpoint, missing[key], stop): key for key in missing}
            try:
                for done in as_completed(asked):
                    try:
                        reply = done.result()
                    except MorebenchError as error:
                        stop.set()
                        failures.append(error)
                        continue
                    if reply is not None:
                        self._keep(asked[done], reply, turn)
            finally:
                stop.set()
        if failures:
            left = sum(key not in self._known for key in missing)
            # Of several, the one that a retry cannot mend.
            worst = max(failures, key=lambda error: error.exit_code)
            raise type(worst)(
                f"{worst} {left} of {len(missing)} questions to it are open; the predictions and the other "
                "replies are kept. The same command asks only what is open; or choose judge none or static."
            )

    def _keep(self, key: str, reply: str, turn: int) -> None:
        self._known[key] = reply
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": key, "model": self._endpoint.model, "turn": turn, "reply": reply}
        with disk_full_named(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, path: Path) -> None:
        """Drops lines that a kill cut short; the others were paid for."""
        lines = path.read_bytes().split(b"\n")
        whole: list[bytes] = []
        for line in filter(None, lines):
            try:
                found = json.loads(line)
                self._known[found["key"]] = str(found["reply"])
            except (ValueError, TypeError, KeyError):
                continue
            whole.append(line)
        if len(whole) < len(list(filter(None, lines))) or lines[-1]:
            write_atomically(path, b"".join(line + b"\n" for line in whole).decode())


def _key(model: str, prompt: str, turn: int) -> str:
    return hashlib.sha256(json.dumps([model, prompt, turn]).encode()).hexdigest()


class _Bearer(requests.auth.AuthBase):
    """Given as `auth`, so that no ~/.netrc takes its place."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        key = next((os.environ[name].strip() for name in KEY_VARIABLES if os.environ.get(name)), "")
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request


def _request(endpoint: Endpoint, prompt: str, stop: Event) -> str | None:
    """None if told to stop. Raises ConfigError where asking again cannot help, else JudgeError."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "n": 1,
    }
    problem, pause = "", endpoint.pause_s
    for attempt in range(_ATTEMPTS):
        if stop.is_set():
            return None
        try:
            # Never redirected: the key goes to nobody but the host the user named.
            answer = requests.post(
                f"{endpoint.url.rstrip('/')}/chat/completions",
                json=body,
                auth=_Bearer(),
                timeout=endpoint.timeout_s,
                allow_redirects=False,
            )
        except (requests.RequestException, UnicodeError) as error:
            problem = type(error).__name__  # its text may hold the request
            asked_for = 0.0
        else:
            status = answer.status_code
            if status == requests.codes.ok and (reply := _content(answer)):
                return reply
            problem = "no text in its answer" if status == requests.codes.ok else f"status {status}"
            if status != requests.codes.ok and status < 500 and status not in _BUSY:
                hint = f" Is {KEY_VARIABLES[0]} set to its key?" if status in (401, 403) else ""
                raise ConfigError(f"{endpoint.shown} refuses: {problem}.{hint}")
            asked_for = _retry_after(answer)
        if attempt + 1 < _ATTEMPTS:
            stop.wait(min(_LONGEST_PAUSE_S, max(pause, asked_for)))
            pause *= 2
    raise JudgeError(f"{endpoint.shown} can't be reached: {problem}, after {_ATTEMPTS} attempts.")


def _content(answer: requests.Response) -> str:
    """Empty where the answer is not of the API's form."""
    try:
        content = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return content.strip() if isinstance(content, str) else ""


def _retry_after(answer: requests.Response) -> float:
    try:
        return float(answer.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
