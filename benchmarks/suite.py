"""All 13 columns at the benchmarks' true row counts, through everything but a model.

    python benchmarks/suite.py [--scale 0.01] [--profile lmms_eval_0_7_3] [--manner right]

Writes a mirror of the ten hub data sets (suite_records.py), and evaluates them as `python -m
morebench.evaluate` does: records, prompts, predictions, scores, results, report. A stand-in for the model
knows the answers, and gives right, wrong, wordy, unreadable and empty ones. Prints the 13-column row, and
seconds and memory of each phase. Nothing is left behind.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from suite_answers import MANNERS, replies, standing_in
from suite_cell import make_configs
from suite_records import write_mirrors

from morebench.config.compose import save_config
from morebench.config.schema import Config, Profile
from morebench.evaluation.asking import ask
from morebench.evaluation.run import evaluate
from morebench.evaluation.sheets import open_sheets
from morebench.reporting.results import ReportRow, Score, load_result


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    cpu_seconds: float
    peak_gib: float


class Clock:
    """Seconds and highest memory of each phase of this process."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        started, cpu = time.perf_counter(), time.process_time()
        yield
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.phases.append(Phase(name, seconds, cpu, peak))


def measure(root: Path, scale: float, profile: Profile, manner: str | None, clock: Clock) -> dict[str, Score]:
    """Column -> its score. Writes everything below `root`."""
    with clock("write the mirror"):
        num_rows = write_mirrors(root / "data", scale)
    config = make_configs(root, num_rows)[profile]
    with clock("open the tasks"):
        sheets = open_sheets(config)  # images are read and kept, as at the first evaluation
    with clock("write the prompts"):
        asked = ask(config, sheets)
    with clock("make up answers"):
        book = replies(asked, manner)
    del sheets, asked
    folder = root / "runs" / "evaluate"
    folder.mkdir(parents=True)
    with clock("evaluate, all of it"), standing_in(book):  # opens the tasks and writes the prompts itself
        evaluate(config, folder, root / "parent")
    with clock("tabulate"):
        return columns(config, folder)


def columns(config: Config, folder: Path) -> dict[str, Score]:
    save_config(config, folder / "config.yaml")
    (folder / "DONE").write_text("{}")
    row = ReportRow(cell={}, labels={}, seed=0, runs={"evaluate": folder})
    scores = load_result(row, config.suite.columns).scores
    return {column.label: scores[column.label] for column in config.suite.columns}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of every row count")
    parser.add_argument("--profile", choices=[profile.name for profile in Profile], default="paper")
    parser.add_argument("--manner", choices=list(MANNERS), help="answer always like this, not in the mix")
    chosen = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as root:
        scores = measure(Path(root), chosen.scale, Profile[chosen.profile], chosen.manner, clock)
    print(
        "\n".join(
            f"{name:>20} {p.value:8.1f}  [{p.low:.1f}, {p.high:.1f}]  n={p.n}" for name, p in scores.items()
        )
    )
    print("".join(f"{label:>11}" for label in scores))
    print("".join(f"{score.value:11.1f}" for score in scores.values()))
    print(f"{'':>20} {'seconds':>8} {'of CPU':>8} {'peak GiB':>8}")
    for phase in clock.phases:
        print(f"{phase.name:>20} {phase.seconds:8.1f} {phase.cpu_seconds:8.1f} {phase.peak_gib:8.2f}")


if __name__ == "__main__":
    main()
