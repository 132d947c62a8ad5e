"""The train step against transformers: `LlavaForConditionalGeneration` and `Trainer`, on the CPU in fp32.

    python benchmarks/train_step.py [--pairs 5] [--steps 4] [--threads 1] [--stage pretrain finetune]

Needs accelerate (`pip install -e '.[dev]'`). The same weights, samples, global batches, optimizer and
schedule. Every run is a process of its own, and the two sides take turns. Ours is `training.run.train` with
everything that a run does: it reads, decodes and tokenizes while the clock runs, sums in a fixed order,
writes metrics and checkpoints. The other side has its inputs ready in memory.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from morebench.config.compose import load_config, save_config
from morebench.config.schema import Step
from morebench.training.run import METRICS, train
from morebench.training.stage import make_stage

sys.path.insert(0, str(Path(__file__).parent))
from train_step_cell import FULL, QUICK, make_cell
from train_step_stock import run_stock

WARM = 2  # steps that are not timed: allocators fill, kernels are chosen
MIB = 2**20


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        _print_run(arguments)
        return
    with TemporaryDirectory() as name:
        root = Path(name)
        steps = WARM + (1 if arguments.quick else arguments.steps)
        config = make_cell(root, QUICK if arguments.quick else FULL, steps)
        config = replace(config, trainer=replace(config.trainer, micro_batch_tokens=arguments.tokens))
        save_config(config, root / "config.yaml")
        for stage in arguments.stage:
            _compare(root, stage, arguments)


def _compare(root: Path, stage: str, arguments: argparse.Namespace) -> None:
    sides = ["ours", "stock", *(["stock, grouped by length"] if stage == "finetune" else [])]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.pairs):
        for side in sides:
            runs[side].append(_run_apart(root, stage, side, arguments))
    print(f"{stage}: {len(runs['ours'][0]['losses']) - WARM} timed steps, {arguments.threads} threads")
    for side in sides:
        rates = sorted(_rate(run) for run in runs[side])
        peak = median(run["peak"] for run in runs[side]) / MIB
        growth = median(run["peak"] - run["before"] for run in runs[side]) / MIB
        print(
            f"  {side}: {median(rates):,.0f} supervised tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), "
            f"peak memory {peak:,.0f} MiB, of which training {growth:,.0f}"
        )
    for side in sides[1:]:
        ratios = sorted(_rate(a) / _rate(b) for a, b in zip(runs["ours"], runs[side], strict=True))
        print(f"  ours / {side}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    difference = max(
        abs(a - b) / b for a, b in zip(runs["ours"][0]["losses"], runs["stock"][0]["losses"], strict=True)
    )
    losses = runs["ours"][0]["losses"]
    print(f"  loss {losses[0]:.4f} to {losses[-1]:.4f}; largest relative difference {difference:.1e}")
    sys.stdout.flush()


def _rate(run: dict[str, Any]) -> float:
    return sum(run["supervised"][WARM:]) / sum(run["seconds"][WARM:])


def _run_apart(root: Path, stage: str, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--root", str(root), "--stage", stage]
    command += ["--threads", str(arguments.threads), "--micro-batch", str(arguments.micro_batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(root: Path, step: Step, side: str, threads: int, micro_batch: int) -> dict[str, Any]:
    """Of every optimizer step: loss, seconds, supervised tokens."""
    config = load_config(root / "config.yaml")
    config = replace(config, trainer=replace(config.trainer, threads=threads))
    parents = {Step.pretrain: root / "parent"}
    with TemporaryDirectory(dir=root) as name:
        if side != "ours":
            stage = make_stage(config, step, parents)
            return run_stock(stage, Path(name), micro_batch, "grouped" in side)
        train(config, step, Path(name), parents)
        lines = [json.loads(line) for line in (Path(name) / METRICS).read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [line["step_s"] for line in lines],
        "supervised": [line["supervised_tokens"] for line in lines],
    }


def _print_run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    before, step = _peak(), Step[arguments.stage[0]]
    found = run(arguments.root, step, arguments.side, arguments.threads, arguments.micro_batch)
    print(json.dumps(found | {"before": before, "peak": _peak()}))


def _peak() -> int:
    """Bytes. Not `ru_maxrss`, which begins with what the process that started this one held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="ours: tokens of a micro-batch")
    parser.add_argument("--micro-batch", type=int, default=4, help="theirs: samples of one")
    parser.add_argument("--stage", nargs="+", default=["pretrain", "finetune"])
    parser.add_argument("--quick", action="store_true", help="whether it runs at all: tiny, one timed step")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
