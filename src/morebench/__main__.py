"""`morebench VERB ...` is `python -m morebench.VERB ...`."""

import difflib
import importlib
import sys

from morebench.errors import EXIT_USER

VERBS = ("train", "plan", "status", "check", "evaluate", "report", "convert", "chat", "track", "data")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: morebench VERB ...   verbs: {', '.join(VERBS)}; `morebench VERB --help` explains one")
        return
    verb = sys.argv.pop(1)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(VERBS)}."
        print(f"error: {verb}: no such verb. {hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER)
    package = verb == "data"  # its verbs have a door of their own
    module = importlib.import_module(f"morebench.{verb}{'.__main__' if package else ''}")
    if verb == "train" or package:
        module.main()
    else:
        from morebench import entry

        entry.run(module.command, module.__doc__ or "")


if __name__ == "__main__":
    main()
