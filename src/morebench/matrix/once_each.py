"""A thousand assembled cells share a few dozen parts: what follows from a part is worked out once."""

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class OnceEach:
    """Results of functions, by the very objects they were given: nobody changes a composed config."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[tuple[object, ...], Any]] = {}

    def __call__(self, make: Callable[..., Made], *parts: object) -> Made:
        """`make(*parts)`. Equal parts that are not the same object are worked out again."""
        key = (make, *map(id, parts))
        if key not in self._known:
            self._known[key] = parts, make(*parts)  # the parts stay alive, and so their ids theirs
        made: Made = self._known[key][1]
        return made
