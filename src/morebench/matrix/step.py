"""Execute one run: lock, train or evaluate, DONE. The body of every backend's job."""

import json
import logging
import shutil
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from morebench.config.compose import load_config, save_config
from morebench.config.schema import Step
from morebench.errors import EXIT_DONE, FencedError, Interrupted, RunError, outcome_of
from morebench.matrix import ledger
from morebench.matrix.cell import NUMERICS_VERSION
from morebench.matrix.mirror import Mirror
from morebench.matrix.plan import PlannedRun
from morebench.matrix.prediction import write_prediction
from morebench.matrix.ranks import local_ranks, train_in_ranks

log = logging.getLogger(__name__)

_WORKING = ("checkpoints", ledger.LOCK, ledger.ATTEMPTS, ledger.DONE, "log.txt")


def prepare_run(run: PlannedRun) -> None:
    """Write what the job needs to know into the run folder: the config travels as a file, not as a pickle."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / "manifest.json").exists():
            facts = {"run_id": run.run_id, "step": run.step.name, "numerics": NUMERICS_VERSION}
            facts |= {"planned_data": run.data_hash}
            ledger.write_json(run.folder / "manifest.json", facts)
        ledger.write_json(run.folder / "cell.json", run.cell.axes)
        parents = {step.name: _place(run, run_id) for step, run_id in run.parents.items()}
        ledger.write_json(run.folder / "parents.json", parents)
        save_config(run.cell.config, run.folder / "config.yaml")
    except OSError as error:
        raise RunError(
            f"{run.folder} cannot be written: {error.strerror}. Choose another place: paths.runs=..."
        ) from error


def _place(run: PlannedRun, run_id: str) -> str:
    """A run id, or the folder of a given parent that lies outside this runs folder."""
    parent = run.cell.parent
    elsewhere = (
        parent is not None
        and parent.run_id == run_id
        and parent.folder.parent != run.folder.absolute().parent
    )
    return str(parent.folder) if parent is not None and elsewhere else run_id


def execute(folder: Path) -> tuple[int, str]:
    """Run the step that `folder` describes; returns exit code and reason, and leaves both in ATTEMPTS.

    Raises HeldError when another process runs it.
    """
    try:
        return _execute(folder)
    except ledger.HeldError:
        raise
    except RunError as error:  # a damaged LOCK or DONE, or the lock was taken: no line of ours in ATTEMPTS
        return error.exit_code, str(error)


def _execute(folder: Path) -> tuple[int, str]:
    with ledger.locked(folder) as me:
        if ledger.is_done(folder):
            return EXIT_DONE, ""
        number = ledger.begin_attempt(folder, me)
        try:
            _run(folder, partial(ledger.check_owner, folder, me))
            code, message = EXIT_DONE, ""
        except FencedError:
            raise
        except Exception as error:
            code, message, is_expected = outcome_of(error)
            if not is_expected:
                log.error(traceback.format_exc())
        ledger.end_attempt(folder, number, code, message)
        return code, message


def _run(folder: Path, fence: Callable[[], None]) -> None:
    config = load_config(folder / "config.yaml")
    step = Step[json.loads((folder / "manifest.json").read_text())["step"]]
    parents = {
        Step[name]: folder.parent / place  # an absolute path stays what it is
        for name, place in json.loads((folder / "parents.json").read_text()).items()
    }
    cell = json.loads((folder / "cell.json").read_text())
    name = "-".join(str(value) for value in cell.values())
    write_prediction(folder, config, step, cell["llm"])
    mirror = Mirror(config.tracking, folder, name, step.name, config.experiments)
    mirror.start()
    status = "FAILED"
    try:
        if step is Step.evaluate:
            from morebench.evaluation.run import evaluate

            evaluate(config, folder, parents[Step.finetune], fence)
        elif (world_size := local_ranks(config.trainer)) > 1:
            train_in_ranks(config, step, folder, parents, world_size, fence)
        else:
            from morebench.training.run import train

            train(config, step, folder, parents, fence)
        fence()
        seal(folder, fence)
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        mirror.close(status=status)


def seal(folder: Path, fence: Callable[[], None]) -> None:
    """Write DONE over everything the run has made."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    artefacts = [path for path in folder.rglob("*") if path.is_file() and _is_artefact(path, folder)]
    ledger.mark_done(folder, artefacts, fence)


def _is_artefact(path: Path, folder: Path) -> bool:
    top = path.relative_to(folder).parts[0]
    return top not in _WORKING and not top.startswith(".")
