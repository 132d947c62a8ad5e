"""Controlled comparisons of LLaVA-style multimodal LLMs."""

import sys
from types import TracebackType


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted.", file=sys.stderr)  # then Python ends by SIGINT, which shells call 130
    else:
        sys.__excepthook__(kind, error, trace)


# A command has just begun (`-m` stands there until Python has found the verb), and no door of ours is there
# yet. Whoever imports this as a library keeps their own hook.
if sys.argv[:1] == ["-m"] or (sys.argv and sys.argv[0].endswith("/morebench")):
    sys.excepthook = _without_traceback
