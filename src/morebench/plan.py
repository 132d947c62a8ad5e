"""What will run, what is done, what is shared, what is missing, and what it will cost.

    python -m morebench.plan experiments=table2
    python -m morebench.plan llm=phi4,gemma2_9b vision=clip,siglip2
    python -m morebench.plan experiments=all trainer.gpu=h200_141gb trainer.devices=8 trainer.strategy=fsdp2

Takes the overrides of `python -m morebench.train -m`; runs nothing and writes nothing.
"""

from collections.abc import Sequence

from morebench import entry
from morebench.config.assemble import assemble
from morebench.config.experiments import expand
from morebench.config.overrides import check
from morebench.matrix.cell import cells_of
from morebench.matrix.plan import Plan, make_plan
from morebench.show_costs import print_costs


def plan_of(overrides: Sequence[str]) -> Plan:
    check(overrides)
    return make_plan(cells_of(assemble(expand(overrides))))


def command(overrides: Sequence[str]) -> None:
    print_costs(plan_of(overrides))


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
