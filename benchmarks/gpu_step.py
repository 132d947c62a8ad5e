"""The train step at the true shapes on one GPU, with random weights, against the plain transformers step.

    python benchmarks/gpu_step.py [--case NAME ...] [--tokens 16384] [--profile FILE]    # H200: some 15 min
    python benchmarks/gpu_step.py --tiny --device cpu                                    # whether it runs

First it compares the ways to compute attention with the loop over samples, forward and backward. MFU counts
useful FLOPs (models/flops.py): no padding, no recompute, logits at supervised positions, for both sides. The
optimizer step is the project's own, by Lightning; it reads nothing from disk. `trainer.KEY=VALUE` arguments
choose what conf/trainer chooses.
"""

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from morebench.config.compose import compose_config
from morebench.config.gpus import gpu_called
from morebench.config.schema import Config, Step
from morebench.models.parts import build_mllm
from morebench.training.choosing import apply_choices
from morebench.training.module import StageModule
from morebench.training.signals import StopRequest
from morebench.training.stage import recipe_of
from morebench.training.strategy import make_trainer, matmul_precision, quiet_libraries, sharding_of

sys.path.insert(0, str(Path(__file__).parent))
from gpu_step_attention import compare_attention
from gpu_step_batches import Micro, flops, micro_batches
from gpu_step_choices import chosen
from gpu_step_stock import run_stock

WARM = 2  # optimizer steps that are not timed: kernels are compiled, the allocator fills
REACHED = 790e12  # FLOP/s of large bf16 matrix products on an H200
GIB = 2**30


@dataclass(frozen=True)
class Case:
    choices: list[str]
    tiny: list[str]
    step: Step


_PHI_TINY, _GEMMA_TINY = ["llm=phi_tiny", "vision=siglip_tiny"], ["llm=gemma2_tiny", "vision=siglip_tiny"]
CASES = {
    "phi4-siglip2-pretrain": Case(["llm=phi4", "vision=siglip2"], _PHI_TINY, Step.pretrain),
    "phi4-siglip2-finetune": Case(["llm=phi4", "vision=siglip2"], _PHI_TINY, Step.finetune),
    "phi4-siglip2-s2-pretrain": Case(
        ["llm=phi4", "vision=siglip2", "resolution=s2"], [*_PHI_TINY, "resolution=s2"], Step.pretrain
    ),
    "gemma2_9b-siglip2-pretrain": Case(["llm=gemma2_9b", "vision=siglip2"], _GEMMA_TINY, Step.pretrain),
}


def main() -> None:
    arguments, overrides = _arguments()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    for line in compare_attention(device, arguments.tiny):
        print(line, flush=True)
    for case_name in arguments.case:
        case = CASES[case_name]
        choices = case.tiny if arguments.tiny else case.choices
        machine = [f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}", "trainer.devices=1"]
        config = compose_config([*choices, "recipe=llava", *machine, *overrides]).config
        batches = list(
            micro_batches(config, case.step, arguments.tokens, arguments.accumulate, arguments.tiny)
        )
        print(f"{case_name}: {_described(batches)}", flush=True)
        try:
            profile = None if arguments.profile is None else f"{arguments.profile}.{case_name}.txt"
            print(*ours(config, case.step, batches, arguments.steps, device, profile), sep="\n", flush=True)
        except torch.OutOfMemoryError as error:
            print(f"  ours: out of memory; lower --tokens. {error}", flush=True)
        _free(device)
        try:
            print(*theirs(config, case.step, batches, arguments.steps, device), sep="\n", flush=True)
        except torch.OutOfMemoryError as error:
            print(f"  transformers: out of memory with one sample at a time. {error}", flush=True)
        _free(device)


def ours(
    config: Config, step: Step, batches: list[Micro], steps: int, device: torch.device, profile: str | None
) -> Iterator[str]:
    recipe, _ = recipe_of(config, step)
    with quiet_libraries(), matmul_precision(recipe.precision):
        choices = chosen(config, recipe, batches, device)
        with torch.device(device):  # a GPU draws billions of weights in a second
            mllm = build_mllm(config, {}, recipe.precision, recipe.trainable)
        apply_choices(mllm, choices)
        trainer = make_trainer(config.trainer, recipe)
        trainer.accumulate_grad_batches = len(batches)
        watch = Stopwatch(device, WARM * len(batches), profile)
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        module = StageModule(
            mllm.train(),
            recipe,
            num_steps=WARM + steps,
            first_step=0,
            sharding=sharding_of(trainer),
            samples=[],
            stop=StopRequest(),
        )
        watch.follow(mllm)
        repeated = [micro.batch for micro in batches] * (WARM + steps)
        trainer.fit(module, DataLoader(repeated, batch_size=None, pin_memory=device.type == "cuda"))
    yield (
        f"  ours: trainer.attention={choices.attention}, loss_kernel={choices.loss_kernel}, "
        f"compile={choices.compile}, {choices.recomputed} blocks recomputed"
    )
    yield f"    {_speed(config, step, batches, watch.seconds / steps, device)}"
    parts = {name: seconds / steps for name, seconds in watch.parts().items()}
    yield "    " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())


def theirs(
    config: Config, step: Step, batches: list[Micro], steps: int, device: torch.device
) -> Iterator[str]:
    if config.resolution.scales != [1]:
        yield "  transformers: LlavaForConditionalGeneration has no S2"
        return
    recipe, _ = recipe_of(config, step)
    samples = [sample for micro in batches for sample in micro.samples]
    size = 32
    while True:
        try:
            seconds = run_stock(config, recipe, samples, size, WARM, steps, device)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        _free(device)
    yield f"  transformers, {size} samples at a time: {_speed(config, step, batches, seconds, device)}"


def _speed(config: Config, step: Step, batches: list[Micro], seconds: float, device: torch.device) -> str:
    useful = flops(config, step, batches) / seconds
    tokens = sum(len(micro.batch.input_ids) for micro in batches) / seconds
    supervised = sum(len(micro.batch.targets) for micro in batches) / seconds
    text = f"{seconds:.3f} s a step, {tokens:,.0f} tokens/s, {supervised:,.0f} supervised tokens/s"
    if device.type != "cuda":
        return f"{text}, {useful / 1e9:,.1f} GFLOP/s"
    kind = gpu_called(torch.cuda.get_device_name(device))
    shares = [f"{useful / REACHED:.1%} of 790"]
    if kind is not None:
        shares.insert(0, f"MFU {useful / (kind.bf16_tflops * 1e12):.1%} of {kind.bf16_tflops:,.0f}")
    peak = torch.cuda.max_memory_allocated(device) / GIB
    return f"{text}, {useful / 1e12:,.0f} TFLOP/s ({', '.join(shares)}), peak memory {peak:.1f} GiB"


def _described(batches: list[Micro]) -> str:
    samples = [sample for micro in batches for sample in micro.samples]
    tokens = sum(len(micro.batch.input_ids) for micro in batches)
    return f"{len(batches)} micro-batches, {len(samples)} samples, {tokens:,} tokens"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Stopwatch(Callback):
    """Seconds of the parts of timed steps: a mark ends a part, and the next one begins."""

    def __init__(self, device: torch.device, warm_batches: int, profile: str | None) -> None:
        self._device = device
        self._warm_batches = warm_batches
        self._profile = profile
        self._marks: list[tuple[str, Any]] = []
        self._is_timing = False

    def follow(self, mllm: nn.Module) -> None:
        for name, label in (("vision", "vision"), ("llm.model", "LLM forward")):
            module = mllm.get_submodule(name)
            module.register_forward_pre_hook(lambda *args: self._mark("embedding, projector, rest"))
            module.register_forward_hook(lambda *args, label=label: self._mark(label))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._warm_batches:
            self._is_timing = True
            self._marks.clear()
            self._synchronise()
            self._began = time.perf_counter()
            if self._profile is not None:
                self._profiler = torch.profiler.profile()
                self._profiler.start()
        self._mark("embedding, projector, rest")

    def on_before_backward(self, *args: Any) -> None:
        self._mark("loss")

    def on_after_backward(self, *args: Any) -> None:
        self._mark("backward")

    def on_train_batch_end(self, *args: Any) -> None:
        self._mark("optimizer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._synchronise()
        self.seconds = time.perf_counter() - self._began
        if self._profile is not None:
            self._profiler.stop()
            key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            Path(self._profile).write_text(self._profiler.key_averages().table(sort_by=key, row_limit=60))

    def parts(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for (_, before), (label, after) in zip(self._marks, self._marks[1:], strict=False):
            on_gpu = self._device.type == "cuda"
            found[label] += before.elapsed_time(after) / 1000 if on_gpu else after - before
        return dict(found)

    def _mark(self, label: str) -> None:
        if not self._is_timing:
            return
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((label, event))
        else:
            self._marks.append((label, time.perf_counter()))

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, help="of a micro-batch; 16,384, or 512 with --tiny")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of an optimizer step")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps")
    parser.add_argument("--profile", help="write torch.profiler's table to FILE.<case>.txt", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs")
    parser.add_argument("overrides", nargs="*", metavar="trainer.KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.tokens is None:
        arguments.tokens = 512 if arguments.tiny else 16_384
    return arguments, arguments.overrides


if __name__ == "__main__":
    main()
