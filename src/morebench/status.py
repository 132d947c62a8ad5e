"""Where every run of these cells stands, and why one failed.

python -m morebench.status experiments=digits
"""

from collections.abc import Sequence

from morebench import entry
from morebench.plan import plan_of
from morebench.show import print_failures, print_plan


def command(overrides: Sequence[str]) -> None:
    plan = plan_of(overrides)
    print_plan(plan)
    print_failures(plan)


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
