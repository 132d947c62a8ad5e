"""Where the time of answering goes, and what a whole suite takes at that speed."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch

from morebench.config.gpus import gpu_called
from morebench.config.schema import Config
from morebench.evaluation.generate import Answer, Request
from morebench.evaluation.model import LoadedModel
from morebench.matrix.answering import answering
from morebench.models.flops import AnswerFlops, answer_flops, sizes

REPEATS = 3
GIB = 2**30

Run = Callable[[LoadedModel, Sequence[Request]], list[Answer]]


def speed_of_suite(config: Config, model: LoadedModel, requests: list[Request], run: Run) -> Iterator[str]:
    """Prefill is timed alone, by answers of one token; decoding is the rest."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = [replace(request, max_new_tokens=1) for request in requests]
    prefill_s, _ = _timed(lambda: run(model, first), device)
    whole_s, answers = _timed(lambda: run(model, requests), device)
    decoded = sum(answer.num_tokens + answer.ended - 1 for answer in answers)
    load, token_s = _load(config, requests, decoded), max(0.0, whole_s - prefill_s) / max(1, decoded)
    speed = load.prefill / prefill_s
    yield (
        f"prefill: {len(requests) / prefill_s:,.1f} questions/s, "
        f"{speed / 1e9:,.0f} GFLOP/s{_mfu(speed, device)}"
    )
    yield (
        f"decoding: {token_s * 1000:.2f} ms for each of {decoded:,} tokens, "
        f"{1 - prefill_s / whole_s:.0%} of the time"
    )
    if device.type == "cuda":
        yield f"peak memory: {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
    work = answering(config)
    if work is None:
        yield f"{config.suite.label}: nothing is assumed of some of its tasks (conf/tasks)"
        return
    prefill_h = work.prefill / speed / 3600
    decode_h = (work.answer_tokens - work.questions) * token_s / 3600
    yield (
        f"{config.suite.label}: {work.questions:,} questions about {work.images:,} images take "
        f"{prefill_h + decode_h:,.2f} hours of this device, {prefill_h:,.2f} of them prefill; reading the "
        "images comes on top where it is slower"
    )


def _load(config: Config, requests: Sequence[Request], decoded: int) -> AnswerFlops:
    model, number = sizes(config), len(requests)
    images = len({image.key for request in requests for image in request.images})
    text = sum(int((~request.prompt.visual_mask).sum()) for request in requests) / number
    return answer_flops(model, images, number, text, 1 + decoded / number)


def _timed(run: Callable[[], list[Answer]], device: torch.device) -> tuple[float, list[Answer]]:
    """Median seconds, and the last answers."""
    seconds, answers = [], run()  # once to warm up
    for _ in range(REPEATS):
        wait(device)
        began = time.perf_counter()
        answers = run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds), answers


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mfu(speed: float, device: torch.device) -> str:
    kind = gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if kind is None:
        return ""
    return f", MFU {speed / (kind.bf16_tflops * 1e12):.1%} of {kind.bf16_tflops:,.0f} TFLOP/s"
