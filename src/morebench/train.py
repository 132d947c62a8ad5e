"""Train and evaluate cells: `python -m morebench.train [-m] OVERRIDE ...` (see --help)."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morebench.config.compose import CONF_DIR, CONFIG_DIR_VARIABLE, Composed, register
from morebench.config.overrides import check
from morebench.config.schema import Features, Step
from morebench.entry import fail
from morebench.errors import EXIT_DONE, EXIT_FAILED, DataError, MorebenchError, join_problems


def launch_cells(job_overrides: Sequence[Sequence[str]], options: Mapping[str, Any]) -> int:
    from morebench.config.assemble import assemble

    return launch(assemble(job_overrides), options)


def launch(composed: Sequence[Composed], options: Mapping[str, Any]) -> int:
    """Plan the cells, run what is missing, print where everything stands; returns the exit code."""
    from morebench.matrix.cell import cells_of
    from morebench.matrix.launch import launch_local
    from morebench.matrix.plan import make_plan
    from morebench.prepare import changed_data, prepare
    from morebench.show import print_outcomes, print_plan

    cells = cells_of(composed)
    prepare([cell.config for cell in cells])
    plan = make_plan(cells)
    reads_data = [run.cell.config for run in plan.todo() if run.step is not Step.evaluate]
    if problems := [*plan.missing_sources, *plan.unusable_data, *changed_data(reads_data)]:
        raise DataError(join_problems(problems))
    if any(cell.config.features is not Features.computed for cell in cells):
        from morebench.matrix.features import check_features

        check_features(plan)
    print_plan(plan, sys.stderr)
    outcomes = launch_local(plan, options.get("n_jobs"))
    print_outcomes(plan, outcomes, sys.stderr)
    codes = {outcome.exit_code for outcome in outcomes} - {EXIT_DONE}
    return codes.pop() if len(codes) == 1 else EXIT_FAILED if codes else EXIT_DONE


def main() -> None:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig

    register()
    arguments = get_args_parser().parse_args()
    if arguments.config_dir:
        os.environ[CONFIG_DIR_VARIABLE] = str(Path(arguments.config_dir).resolve())
    elif os.environ.get(CONFIG_DIR_VARIABLE):
        sys.argv += ["--config-dir", os.environ[CONFIG_DIR_VARIABLE]]
    try:
        check(arguments.overrides, multirun=arguments.multirun)
    except MorebenchError as error:
        fail(error)

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
    def one_cell(tree: Any) -> None:
        from morebench.config.experiments import expand

        hydra_config = HydraConfig.get()
        options = {key: value for key, value in hydra_config.launcher.items() if key != "_target_"}
        run_and_exit(expand(list(hydra_config.overrides.task)), options)

    one_cell()


def run_and_exit(job_overrides: Sequence[Sequence[str]], options: Mapping[str, Any]) -> None:
    """Leave with our exit code: Hydra would turn any failure into 1."""
    try:
        code = launch_cells(job_overrides, options)
    except MorebenchError as error:
        fail(error)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
