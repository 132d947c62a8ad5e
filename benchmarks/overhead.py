"""What checkpoints, telemetry and shipping to MLflow cost together, as a share of a step of one second.

    python benchmarks/overhead.py [rounds=5] [steps=60]     # two minutes on two cores

A tiny cell is trained in turns with all three and with none. The difference is in seconds per optimizer step;
it does not grow with the model, but for checkpoints: these are timed apart, by the parameter.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from morebench.config.schema import Config, Step, Tracking
from morebench.matrix.mirror import Mirror
from morebench.matrix.mirror_store import prepare
from morebench.matrix.shipper import Shipper
from morebench.training.fragments import whole
from morebench.training.module import StageModule
from morebench.training.resume import save_checkpoint
from morebench.training.run import train
from morebench.training.saving import Saver
from morebench.training.telemetry import Telemetry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_training import make_cell, metrics, with_recipe, with_trainer

GOAL = 0.02
STEPS_BETWEEN, SECONDS_BETWEEN = 200, 15 * 60  # checkpoints, as in conf/trainer/auto.yaml
NUM_PARAMETERS = 10_000_000
PHI4 = 3_800_000_000
RANKS = 8
SHIPPING = "shipping, CPU of its thread"

parts: Counter[str] = Counter()  # seconds, over all runs with everything


def main(rounds: str = "5", steps: str = "60") -> None:
    with TemporaryDirectory() as place:
        root = Path(place)
        tracking = Tracking(uri=f"sqlite:///{root / 'mlflow.db'}", experiment="overhead")
        prepare(tracking)
        base = with_trainer(make_cell(root / "cell"), checkpoint_every_n_steps=STEPS_BETWEEN)
        config = with_recipe(base, epochs=int(steps), max_steps=int(steps))
        run(with_recipe(config, max_steps=2), root / "warm", tracking)
        parts.clear()
        pairs = []
        for number in range(int(rounds)):
            # the order changes, so that whatever drifts costs both alike
            order = (True, False) if number % 2 else (False, True)
            took = {flag: run(config, root / f"{number}{flag}", tracking if flag else None) for flag in order}
            pairs.append((took[True], took[False]))
        report(pairs, int(steps))
        checkpoint(root / "checkpoint")


def report(pairs: list[tuple[tuple[float, float], tuple[float, float]]], steps: int) -> None:
    for index, name in ((0, "wall"), (1, "CPU")):
        extra = [(on[index] - off[index]) / steps for on, off in pairs]
        ratio = statistics.median(on[index] / off[index] for on, off in pairs)
        off_step = statistics.median(off[index] for _, off in pairs) / steps
        cost = statistics.median(extra)
        verdict = "" if name == "CPU" else f" (goal: {GOAL:.0%})"
        print(f"{name}: step {off_step:.4f} s without, ratio {ratio:.4f}; + {1000 * cost:.2f} ms a step,")
        print(f"  {cost:.2%} of a step of 1 s{verdict}; single pairs {[f'{1000 * x:.1f}' for x in extra]} ms")
    wall = sum(on[0] for on, _ in pairs)
    print(f"shipping goes by time, not by steps: {parts[SHIPPING] / wall:.2%} of one core, in its thread")
    print("of which, in ms a step:")
    for name, seconds in parts.most_common():
        print(f"  {name}: {1000 * seconds / steps / len(pairs):.3f}")


def run(config: Config, folder: Path, tracking: Tracking | None) -> tuple[float, float]:
    """Wall and CPU seconds of the process, shipping thread included, from the first step to the last.

    Without `tracking` there are no checkpoints and no telemetry either.
    """
    clocks: list[tuple[float, float]] = []

    def note(self: StageModule) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    begin = StageModule.on_train_epoch_start
    with ExitStack() as stack:
        replace = stack.enter_context(_patches())
        replace(StageModule, "on_train_epoch_start", lambda self: (begin(self), note(self)))
        replace(StageModule, "on_train_epoch_end", note)
        folder.mkdir()
        if tracking is not None:
            _timed(replace, Telemetry, "on_train_batch_end", "telemetry: a line, flops, progress")
            _timed(replace, StageModule, "_of_all_ranks", "telemetry: values of all ranks")
            _timed(replace, Saver, "on_train_batch_end", "checkpoints of the tiny cell")
            _timed(replace, Shipper, "ship", SHIPPING, clock=time.thread_time)
            mirror = Mirror(tracking, folder, "cell", "pretrain", None)
            mirror.start()
        else:
            replace(Telemetry, "on_train_batch_end", lambda *_: None)
            replace(Saver, "on_train_batch_end", lambda *_: None)
        train(config, Step.pretrain, folder, {})
        if tracking is not None:
            assert mirror.close(timeout=120)
            assert len(metrics(folder)) == config.stage.pretrain.max_steps
    (wall, cpu), (wall_end, cpu_end) = clocks
    return wall_end - wall, cpu_end - cpu


def checkpoint(root: Path) -> None:
    """Weights and AdamW's moments, in fp32, written and read back."""
    seconds = []
    for step in range(3):
        tensors = {"parameters": {"w": whole(torch.randn(NUM_PARAMETERS))}}
        tensors["optimizer"] = {f"w/{name}": whole(torch.randn(NUM_PARAMETERS)) for name in ("m", "v")}
        begun = time.perf_counter()
        save_checkpoint(root, step, tensors, {})
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    rate = 12 * NUM_PARAMETERS / median / 1e6
    between = min(STEPS_BETWEEN, SECONDS_BETWEEN)
    print(f"checkpoint of {NUM_PARAMETERS / 1e6:.0f} M parameters: {median:.2f} s, {rate:,.0f} MB/s;")
    print(f"  every {between} steps of 1 s: {median / between:.2%}. A projector of 2 layers has 13 to 25 M.")
    share = PHI4 / RANKS / NUM_PARAMETERS * median / between
    print(f"  {PHI4 / 1e9:.1f} G parameters, if {RANKS} ranks wrote their shares as fast: {share:.1%}")


@contextmanager
def _patches() -> Iterator[Callable[[Any, str, Any], None]]:
    with ExitStack() as stack:
        yield lambda owner, name, new: stack.enter_context(patch.object(owner, name, new)) and None


def _timed(
    replace: Callable[[Any, str, Any], None],
    owner: Any,
    name: str,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    original = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        begun = clock()
        try:
            return original(*arguments)
        finally:
            parts[label] += clock() - begun

    replace(owner, name, timed)


if __name__ == "__main__":
    main(*(argument.partition("=")[2] for argument in sys.argv[1:]))
