"""Answering a GQA-shaped load: image prefixes shared, against one question at a time, against transformers.

    python benchmarks/generate.py [--pairs 3] [--images 4] [--threads 1]   # CPU, fp32; some 8 min
    python benchmarks/generate.py --device cuda --shape phi4               # bf16, true shapes, random weights

The same weights, prompts and pixels; the sides take turns in one process. *shared*: `Generator` as an
evaluate step uses it. *alone*: the same with a question at a time, prompt and image computed whole.
*transformers*: `LlavaForConditionalGeneration.generate`, 16 at a time, padded on the left, its pixels ready
in memory. Answers of fp32 must be equal but for near ties; then bf16 shared is held against bf16 alone. With
--suite what the speeds mean for a whole suite.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from morebench.config.schema import Config, Precision
from morebench.evaluation.generate import Answer, Generator, Request, plan_chunks
from morebench.evaluation.model import LoadedModel
from morebench.training.strategy import exact_arithmetic

sys.path.insert(0, str(Path(__file__).parent))
from generate_load import QUESTIONS, SHAPES, Shape, make_config, make_model, make_requests
from generate_stock import Stock
from generate_suite import speed_of_suite, wait

STOCK_SIZE = 16  # questions of a batch


@dataclass
class Side:
    run: Callable[[], None]
    answered: int  # questions of a run
    seconds: list[float]
    cpu_seconds: list[float]


def main() -> None:
    arguments = _arguments()
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {arguments.threads} threads"
    )
    print(f"{name}, torch {torch.__version__}, shape {arguments.shape}", flush=True)
    with exact_arithmetic(arguments.threads):  # as an evaluate step
        for grid in shape.grids if arguments.grid is None else arguments.grid:
            print(f"{grid} visual tokens: {QUESTIONS} questions about each of {arguments.images} images")
            for line in measure(shape, grid, device, arguments):
                print(f"  {line}", flush=True)


def measure(shape: Shape, grid: int, device: torch.device, arguments: argparse.Namespace) -> Iterator[str]:
    on_cpu = device.type == "cpu"
    config = make_config(shape, grid, on_cpu)
    model = make_model(config, Precision.fp32 if on_cpu else Precision.bf16, device)
    requests = make_requests(shape, model, arguments.images)
    yield from compare(config, model, requests, arguments)
    if arguments.suite:
        yield from speed_of_suite(config, model, requests, shared)
    if on_cpu:  # on a GPU all was bf16
        rounded = make_model(config, Precision.bf16, device)
        yield f"bf16, shared against alone: {flips(rounded, requests, arguments.few)}"


def compare(
    config: Config, model: LoadedModel, requests: list[Request], arguments: argparse.Namespace
) -> list[str]:
    found: dict[str, list[Answer]] = {}
    few = requests[: arguments.few]
    stock = Stock(config, model, few, STOCK_SIZE)
    texts: list[str] = []

    def run_shared() -> None:
        found["shared"] = shared(model, requests)

    def run_alone() -> None:
        found["alone"] = alone(model, few)

    def run_stock() -> None:
        texts[:] = stock.answer()

    sides = {
        "shared": Side(run_shared, len(requests), [], []),
        "alone": Side(run_alone, len(few), [], []),
        "transformers": Side(run_stock, len(few), [], []),
    }
    shared(model, requests[:QUESTIONS]), alone(model, requests[:2]), stock.answer(1)  # warm
    for _ in range(arguments.pairs):
        for side in sides.values():
            wait(model.device)
            began, cpu_began = time.perf_counter(), time.process_time()
            side.run()
            wait(model.device)
            side.seconds.append(time.perf_counter() - began)
            side.cpu_seconds.append(time.process_time() - cpu_began)
    tokens = sum(answer.num_tokens for answer in found["shared"]) / len(requests)
    lines = [f"answers of {tokens:.1f} tokens and one that ends them; up to {model.batch_size} at once"]
    rates = {name: [side.answered / seconds for seconds in side.seconds] for name, side in sides.items()}
    lines += [f"{name}: {_spread(rate, '.2f')} questions/s" for name, rate in rates.items()]
    for other in ("alone", "transformers"):
        line = f"shared / {other}: {_spread(_ratios(rates['shared'], rates[other]), '.1f')}"
        if model.device.type == "cpu":  # which other programs of the machine disturb less
            cpu = {
                name: [side.answered / seconds for seconds in side.cpu_seconds]
                for name, side in sides.items()
            }
            line += f"; by CPU time {_spread(_ratios(cpu['shared'], cpu[other]), '.1f')}"
        lines.append(line)
    is_exact = model.mllm.llm.dtype == torch.float32
    others = {"alone": [answer.text for answer in found["alone"]], "transformers": texts}
    for other, answers in others.items():
        lines.append(f"against {other}: {differences(found['shared'], answers, is_exact)}")
    return lines


def shared(model: LoadedModel, requests: Sequence[Request]) -> list[Answer]:
    """As an evaluate step does it."""
    generator, answers = Generator(model), dict[int, Answer]()
    for chunk in plan_chunks(requests, model.batch_size, model.cache_positions(None)):
        answers |= zip(chunk, generator.answer([requests[i] for i in chunk]), strict=True)
    return [answers[i] for i in range(len(requests))]


def alone(model: LoadedModel, requests: Sequence[Request]) -> list[Answer]:
    """Each with its image, which is read and encoded again."""
    generator = Generator(model)
    return [generator.answer([request], share=False)[0] for request in requests]


def flips(model: LoadedModel, requests: Sequence[Request], few: int | None) -> str:
    """How many answers sharing changes where it may: in bf16."""
    answers = [answer.text for answer in alone(model, requests[:few])]
    return differences(shared(model, requests), answers, is_exact=False)


def differences(ours: Sequence[Answer], theirs: Sequence[str], is_exact: bool) -> str:
    """Raises SystemExit for fp32 answers that differ without a near tie."""
    pairs = [(answer, text) for answer, text in zip(ours, theirs, strict=False) if answer.text != text]
    ties = sum(answer.near_ties > 0 for answer, _ in pairs)
    if is_exact and ties < len(pairs):
        wrong = next((answer.text, text) for answer, text in pairs if not answer.near_ties)
        raise SystemExit(
            f"{len(pairs) - ties} answers differ without a near tie, such as {wrong[0]!r}, {wrong[1]!r}"
        )
    of_which = f", all after near ties ({ties})" if is_exact and pairs else ""
    return f"{len(pairs)} of {len(theirs)} answers differ{of_which}"


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _spread(values: Sequence[float], spec: str) -> str:
    return f"{median(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--grid", type=int, nargs="+", help="numbers of visual tokens; all that the shape has"
    )
    parser.add_argument("--images", type=int, default=4, help=f"each with {QUESTIONS} questions")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--few", type=int, help="only so many questions for all but the shared side; all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--suite", action="store_true", help="what it means for a whole suite")
    arguments = parser.parse_args()
    arguments.suite = arguments.suite or arguments.device != "cpu"
    return arguments


if __name__ == "__main__":
    main()
