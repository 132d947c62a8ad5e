"""The parts and the whole: sizes, a forward and a backward of both train steps."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morebench.config.schema import Config, Part, Precision, Step
from morebench.conformance.findings import Finding, judged, shown
from morebench.data.batch import Batch
from morebench.evaluation.generate import generation_attention
from morebench.models.flops import sizes
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, freeze_all_but, module

SMALL = 200e6  # parameters; random ones are cheap enough to compute with
_BYTES = {Precision.fp32: 8, Precision.bf16: 4}  # per parameter: its value and its gradient


@dataclass(frozen=True)
class Built:
    mllm: MLLM
    precision: Precision
    is_meta: bool
    origin: str  # for the report


def build_on_meta(config: Config) -> MLLM:
    """Shapes without numbers."""
    with torch.device("meta"):
        mllm = build_mllm(config, {}, Precision.fp32, [Part.projector, Part.llm])
    rotary: Any = getattr(mllm.llm.base_model, "rotary_emb", None)
    if rotary is not None:
        rotary.rope_type = "default"  # some ask for the largest position, and there are no numbers on meta
    return mllm


def build_for_real(config: Config, weights: Mapping[Part, Path], on_meta: MLLM) -> Built:
    """With the starting weights if all are on this machine and fit into its memory; small models always."""
    num_parameters = sum(parameter.numel() for parameter in on_meta.parameters())
    missing = [part.name for part in (Part.llm, Part.vision) if part not in weights]
    if missing and num_parameters > SMALL:
        return Built(on_meta, Precision.fp32, True, f"shapes alone: no weights of {' and '.join(missing)}")
    free = _free_bytes(config)
    for precision in Precision:
        if num_parameters * _BYTES[precision] < 0.8 * free:
            mllm = build_mllm(config, weights, precision, ())
            if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
                mllm.to("cuda")
            origin = f"random weights of {' and '.join(missing)}" if missing else "starting weights"
            return Built(mllm, precision, False, f"{origin}, {precision.name}")
    needed = num_parameters * _BYTES[Precision.bf16] / 1e9
    origin = f"shapes alone: {needed:.0f} GB needed, {free / 1e9:.0f} GB free here"
    return Built(on_meta, Precision.fp32, True, origin)


def examine_sizes(config: Config, mllm: MLLM) -> Iterator[Finding]:
    """`mllm` may be on meta: nothing is computed."""
    model = sizes(config)
    vision: Any = mllm.vision
    llm: Any = mllm.llm
    width = llm.config.hidden_size
    yield judged(
        "sizes",
        "visual tokens",
        vision.num_visual_tokens == model.num_visual_tokens,
        f"{vision.num_visual_tokens} of width {vision.feature_dim}, from {vision.image_size} pixels a side",
        str(model.num_visual_tokens),
    )
    embeddings, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    outside = {id(embeddings), id(head)}
    matrices = sum(p.numel() for p in llm.parameters() if p.dim() > 1 and id(p) not in outside)
    body = sum(p.numel() for p in llm.parameters() if id(p) not in outside)
    yield judged(
        "sizes",
        "LLM",
        matrices == model.llm_body,
        f"width {width}, {body:,} parameters and {embeddings.numel():,} in embeddings"
        f"{' (tied to the head)' if embeddings is head else f', {head.numel():,} in the head'}",
        f"{model.llm_body:,} weights in matrices, found {matrices:,}: FLOPs and memory below would be wrong",
    )
    num_projector = sum(model.projector) + len(model.projector) * width
    yield judged(
        "sizes",
        "projector",
        _count(mllm.projector) == num_projector,
        f"{vision.feature_dim} -> {width}, {_count(mllm.projector):,} parameters",
        f"{num_projector:,}",
    )
    yield shown("sizes", "vision encoder", f"{_count(module(mllm, Part.vision)):,} parameters are used")


def examine_step(
    step: Step, built: Built, with_image: Batch, text_only: Batch, both: Batch, trained: Collection[Part]
) -> Iterator[Finding]:
    """One sample with an image, one without, and both packed as one sequence."""
    mllm, topic = built.mllm, step.name
    freeze_all_but(mllm, trained)
    mllm.train()
    mllm.zero_grad()
    with _autocast(built):
        loss = mllm(with_image)
        loss.backward()
    names = _names(trained)
    without = {part for part in Part if part in trained and not _has_gradients(module(mllm, part), built)}
    extra = {
        part
        for part in Part
        if part not in trained and any(p.grad is not None for p in module(mllm, part).parameters())
    }
    yield judged(
        topic,
        "backward",
        not without and not extra,
        f"gradients in {names} alone"
        if not without and not extra
        else f"none in {_names(without)}, some in frozen {_names(extra)}",
        f"gradients in {names} alone",
    )
    mllm.zero_grad()
    if built.is_meta:
        yield judged(topic, "forward", loss.shape == (), "a loss, as shapes")
        return
    with torch.no_grad(), _autocast(built):
        packed, alone = mllm(both).item(), loss.item() + mllm(text_only).item()
    per_token = loss.item() / max(1, int(with_image.num_supervised))
    yield judged(
        topic,
        "forward",
        bool(torch.isfinite(loss)),
        f"loss {per_token:.3f} per supervised token",
        "a finite one",
    )
    tolerance = 1e-4 if built.precision is Precision.fp32 else 0.03
    difference = abs(packed / alone - 1)
    yield judged(
        topic,
        "packed = apart",
        difference < tolerance,
        f"losses differ by {difference:.1e}",
        f"at most {tolerance:.0e}: attention must not cross samples",
    )


@torch.no_grad()
def examine_scale(built: Built, batch: Batch) -> Iterator[Finding]:
    """Gemma multiplies its token embeddings; visual tokens must be multiplied alike."""
    embeddings: Any = built.mllm.llm.get_input_embeddings()
    given, stored = embeddings(batch.input_ids).float(), embeddings.weight[batch.input_ids].float()
    text, visual = (given.norm() / stored.norm()).item(), built.mllm.visual_scale
    yield judged(
        "LLM",
        "scale",
        abs(visual / text - 1) < 0.01,  # bf16 rounds the factor
        f"token embeddings times {text:.4g}, visual tokens times {visual:.4g}",
        "the same: llm.visual_scale is one or sqrt_hidden",
    )


@torch.no_grad()
def examine_attention(built: Built, batch: Batch) -> Iterator[Finding]:
    """Our packed attention against the LLM's own, on the text of one sample."""
    llm: Any = built.mllm.eval().llm
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
    }
    ours = llm.base_model(**inputs, cu_seqlens=batch.cu_seqlens.tolist()).last_hidden_state.float()
    with generation_attention(llm):
        theirs = llm.base_model(**inputs).last_hidden_state.float()
    if not theirs.isfinite().all():
        yield judged("LLM", "weights", False, "hidden states are NaN or infinite", "finite weights")
        return
    difference = float((ours - theirs).norm() / theirs.norm())
    tolerance = 1e-4 if built.precision is Precision.fp32 else 0.03
    yield judged(
        "LLM",
        "attention",
        difference < tolerance,
        f"hidden states differ from transformers' own attention by {difference:.1e}",
        f"at most {tolerance:.0e}: this architecture's attention needs something ours does not do",
    )


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _names(parts: Collection[Part]) -> str:
    return " and ".join(sorted(part.name for part in parts)) or "none"


def _has_gradients(part: nn.Module, built: Built) -> bool:
    gradients = [parameter.grad for parameter in part.parameters()]
    found = [gradient for gradient in gradients if gradient is not None]
    return bool(found) and (built.is_meta or any(bool(gradient.any()) for gradient in found))


@contextmanager
def _autocast(built: Built) -> Iterator[None]:
    device = built.mllm.llm.device.type
    if built.precision is Precision.fp32:
        yield
    else:
        with torch.autocast(device, torch.bfloat16):
            yield


def _free_bytes(config: Config) -> int:
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
