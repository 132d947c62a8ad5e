"""What a chat is asked to do: the command line, read and checked before anything is loaded. No torch."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec

from morebench.config.compose import Override, parse_overrides
from morebench.config.overrides import check
from morebench.config.schema import Config
from morebench.errors import ConfigError, join_problems

MOST_RUNS = 4
_TEXTS = ("image", "prompt")  # as they are typed: a question has commas and quotation marks
_OWN = ("run", "compare", *_TEXTS, "max_new_tokens", "page", "host", "port")
_FREE = ("paths", "trainer", "stage.evaluate")  # of a run's config; the rest says what the model is
_INSTALL = ".venv/bin/uv pip install -e '.[page]'"


@dataclass
class ChatOptions:
    runs: list[str] = field(default_factory=list)
    image: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 512
    page: bool = False
    host: str = "127.0.0.1"
    port: int = 7860
    overrides: list[str] = field(default_factory=list)  # of the runs' configs

    def of(self, *groups: str) -> list[str]:
        """The overrides of these groups."""
        return [text for text in self.overrides if text.partition("=")[0].split(".")[0] in groups]


def read_options(arguments: Sequence[str]) -> ChatOptions:
    """Raises one ConfigError for everything that is wrong."""
    options, given = ChatOptions(), list[str]()
    problems: list[str] = []
    others = []
    for argument in arguments:
        key, is_set, text = argument.partition("=")
        if is_set and key in _TEXTS:
            given.append(key)
            setattr(options, key, _unquoted(argument, text))
        else:
            others.append(argument)
    for override in parse_overrides(others):
        given.append(override.key)
        if override.problem:
            problems.append(override.problem)
        elif override.key in _OWN:
            problems += _set(options, override)
        elif any(f"{override.key}.".startswith(f"{free}.") for free in _FREE):
            options.overrides.append(override.text)
        else:
            problems.append(_refused(override))
    problems += [f"{key}=... is given twice." for key in dict.fromkeys(given) if given.count(key) > 1]
    problems += _contradictions(options, given)
    try:
        check(options.overrides, multirun=False)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems))
    return options


def _unquoted(argument: str, text: str) -> str | None:
    """Quotation marks around the whole are Hydra's, for those who are used to it; so is null."""
    if text[:1] in ("'", '"') and text[:1] == text[-1:]:
        (parsed,) = parse_overrides([argument])
        if not parsed.problem and not parsed.is_sweep:
            return parsed.values[0].removeprefix(text[0]).removesuffix(text[0])
    return None if text in ("", "null") else text


def _set(options: ChatOptions, override: Override) -> Iterator[str]:
    key, value = override.key, override.values[0]
    if key == "compare":
        options.runs = _names(override)
        return
    if override.is_sweep:
        yield f"{override.text}: expected one value." + (
            f" Several runs: compare=[{','.join(override.values)}]" if key == "run" else ""
        )
    elif key == "run":
        options.runs = [value]
    elif key == "host":
        options.host = value
    elif key == "page":
        if value.lower() not in ("true", "false"):
            yield f"{override.text}: expected true or false."
        options.page = value.lower() == "true"
    else:
        least, most = (1, None) if key == "max_new_tokens" else (1, 65535)
        number = int(value) if value.isascii() and value.isdigit() else 0
        if number < least or (most is not None and number > most):
            yield f"{override.text}: expected a whole number from {least}{f' to {most}' if most else ' up'}."
        setattr(options, key, number)


def _names(override: Override) -> list[str]:
    """compare=[A,B], and compare=A,B as a sweep is written."""
    if override.is_sweep:
        return list(override.values)
    return [name.strip().strip("'\"") for name in override.values[0].strip("[]").split(",") if name.strip()]


def _contradictions(options: ChatOptions, given: Sequence[str]) -> Iterator[str]:
    if ("run" in given) == ("compare" in given):
        both = "both" if "run" in given else "neither"
        yield f"expected run=ID or compare=[ID1,ID2,...], found {both}. See --help."
    elif "compare" in given:
        if not 2 <= len(options.runs) <= MOST_RUNS:
            yield f"compare=...: expected 2 to {MOST_RUNS} runs, found {len(options.runs)}."
        yield from (
            f"compare=...: {run} is named twice."
            for run in dict.fromkeys(options.runs)
            if options.runs.count(run) > 1
        )
    for key in ("host", "port"):
        if key in given and not options.page:
            yield f"{key}=...: only with page=true."
    if options.page and options.prompt is not None:
        yield "prompt=...: not with page=true, where questions are typed into the page."
    if options.page and find_spec("gradio") is None:
        yield f"page=true needs gradio, which is not installed. Run: {_INSTALL}"


def _refused(override: Override) -> str:
    top = override.key.split(".")[0].split("/")[0]
    if top in {each.name for each in fields(Config)}:
        return f"{override.text}: the run has it fixed. Free: {', '.join(_FREE)}."
    near = difflib.get_close_matches(override.key, (*_OWN, *_FREE), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join((*_OWN, *_FREE))}."
    return f"{override.text}: there is no {override.key}. {hint}"
