"""What is done with data sets by hand.

    python -m morebench.data build ...     a pre-training subset of LAION or Recap-DataComp-1B
    python -m morebench.data check ...     every record and image of training data, once
    python -m morebench.data cache ...     the features of a vision encoder, for runs with features=cached

`python -m morebench.data build --help` explains it; so for the others.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from morebench import entry
from morebench.errors import EXIT_USER

SUB_VERBS = {
    "build": "morebench.data.build",
    "check": "morebench.check_data",
    "cache": "morebench.cache_features",
}  # module with `command` and its help as docstring


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    verb = arguments.pop(0)
    if verb not in SUB_VERBS:
        near = difflib.get_close_matches(verb, SUB_VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(SUB_VERBS)}."
        print(f"error: data {verb}: no such verb. {hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER)
    module = importlib.import_module(SUB_VERBS[verb])
    entry.run(module.command, module.__doc__ or "", arguments)


if __name__ == "__main__":
    main()
