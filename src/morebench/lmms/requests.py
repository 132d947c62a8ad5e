"""What a request of lmms-eval asks: where its images go, how long an answer may be."""

from collections.abc import Iterable, Mapping
from typing import Any

from morebench.config.schema import Profile
from morebench.errors import ConfigError, DataError, join_problems
from morebench.evaluation.tasks.benchmark import IMAGE_TOKEN, with_image_tokens

DEFAULT_MAX_NEW_TOKENS = 1024  # where a task sets none, as in lmms-eval's wrapper of LLaVA

# The values that mean greedy generation without any penalty.
_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
}
# No greedy answer depends on the first two. lmms-eval's wrapper of LLaVA never applies stop strings, and
# squares images as the model was trained to, whatever a task says.
_WITHOUT_EFFECT = ("top_p", "top_k", "until", "image_aspect_ratio")


def place_images(text: str, num_images: int, profile: Profile, where: str) -> tuple[str, int]:
    """-> the user message, and how many of the images, from the first on, its tokens stand for.

    Raises DataError if there are tokens without an image.
    """
    if (num_tokens := text.count(IMAGE_TOKEN)) > num_images:
        raise DataError(f"{where}: its text has {num_tokens} {IMAGE_TOKEN}, but {num_images} image(s).")
    question = with_image_tokens(text, [str(number) for number in range(num_images)], profile)
    return question.text, len(question.images)


def answer_limit(generation: Mapping[str, Any]) -> int:
    """Tokens that an answer may have at most."""
    limit = generation.get("max_new_tokens")
    return DEFAULT_MAX_NEW_TOKENS if limit is None else int(limit)


def check_generation(asked: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """`asked`: (task, generation arguments). Raises one ConfigError for all that is not greedy generation."""
    problems = dict.fromkeys(f"{task}: {problem}" for task, each in asked for problem in _problems(each))
    if problems:
        hint = "Set them with --gen_kwargs do_sample=False,temperature=0,..."
        raise ConfigError(f"{join_problems(problems)}\nAnswers are greedy. {hint}")


def _problems(generation: Mapping[str, Any]) -> Iterable[str]:
    for key, value in generation.items():
        if key == "max_new_tokens":
            whole = value is None or (isinstance(value, int | float) and value == int(value) and value >= 1)
            if not whole:
                yield f"max_new_tokens must be a whole number from 1 on, found {value!r}"
        elif key in _GREEDY:
            if value not in _GREEDY[key]:
                yield f"{key} must be {_GREEDY[key][0]}, found {value!r}"
        elif key not in _WITHOUT_EFFECT:
            known = ", ".join(["max_new_tokens", *_GREEDY, *_WITHOUT_EFFECT])
            yield f"{key}={value!r} is not known. There are: {known}"
