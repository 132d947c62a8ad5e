"""Execute one run: lock, train or evaluate, DONE. The body of every backend's job."""

import errno
import json
import logging
import shutil
import traceback
from pathlib import Path

from morebench.config.compose import load_config, save_config
from morebench.config.schema import Step
from morebench.errors import EXIT_DISK_FULL, EXIT_DONE, EXIT_FAILED, Interrupted, MorebenchError, RunError
from morebench.matrix import ledger
from morebench.matrix.mirror import Mirror
from morebench.matrix.plan import PlannedRun
from morebench.matrix.prediction import write_prediction

log = logging.getLogger(__name__)

_WORKING = ("checkpoints", ledger.LOCK, ledger.ATTEMPTS, ledger.DONE, "log.txt")


def prepare_run(run: PlannedRun) -> None:
    """Write what the job needs to know into the run folder: the config travels as a file, not as a pickle."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / "manifest.json").exists():
            facts = {"run_id": run.run_id, "step": run.step.name, "planned_data": run.data_hash}
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
    """Run the step that `folder` describes; returns exit code and reason, and leaves both in ATTEMPTS."""
    try:
        return _execute(folder)
    except RunError as error:  # somebody else holds the lock
        return error.exit_code, str(error)


def _execute(folder: Path) -> tuple[int, str]:
    with ledger.locked(folder) as me:
        if ledger.is_done(folder):
            return EXIT_DONE, ""
        number = ledger.begin_attempt(folder, me)
        try:
            _run(folder)
            code, message = EXIT_DONE, ""
        except MorebenchError as error:
            code, message = error.exit_code, str(error)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            code, message = (EXIT_DISK_FULL if full else EXIT_FAILED), f"{type(error).__name__}: {error}"
            log.error(traceback.format_exc())
        except Exception as error:
            code, message = EXIT_FAILED, f"{type(error).__name__}: {error}"
            log.error(traceback.format_exc())
        ledger.end_attempt(folder, number, code, message)
        return code, message


def _run(folder: Path) -> None:
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

            evaluate(config, folder, parents[Step.finetune])
        else:
            from morebench.training.run import train

            train(config, step, folder, parents)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        artefacts = [path for path in folder.rglob("*") if path.is_file() and _is_artefact(path, folder)]
        ledger.mark_done(folder, artefacts)
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        mirror.close(status=status)


def _is_artefact(path: Path, folder: Path) -> bool:
    top = path.relative_to(folder).parts[0]
    return top not in _WORKING and not top.startswith(".")
