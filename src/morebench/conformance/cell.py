"""All findings on one cell, in the order they are printed."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from morebench.config.schema import Config, Part, Precision, Step
from morebench.conformance.findings import Finding, failed, judged, shown, skipped, until_error
from morebench.conformance.image import examine_image, examine_published, probe_image, processor_of
from morebench.conformance.model import (
    Built,
    build_for_real,
    build_on_meta,
    examine_attention,
    examine_scale,
    examine_sizes,
    examine_step,
)
from morebench.conformance.text import PROBES, TEXT_ONLY, chat_format, examine_format, examine_tokenizer
from morebench.data.batch import Batch, collate
from morebench.data.chat import Encoded
from morebench.errors import WeightsError
from morebench.models.flops import llm_shape, sample_flops, sizes
from morebench.models.llm import load_tokenizer
from morebench.models.memory import is_counted, memory
from morebench.models.mllm import MLLM
from morebench.models.rope import check_max_length
from morebench.models.weights import absence, locate
from morebench.training.stage import recipe_of

TRAIN_STEPS = (Step.pretrain, Step.finetune)
# Text and supervised tokens of the sample that is priced: a caption; some turns of a conversation.
PRICED = {Step.pretrain: (25, 20), Step.finetune: (250, 125)}
_PROBE_LENGTH = (24, 8)  # text and supervised tokens, where there is no tokenizer


def examine(config: Config) -> Iterator[Finding]:
    """Nothing is downloaded or built: what is not on this machine is skipped, and says what would get it."""
    weights = {
        part: locate(getattr(config, part.name).weights, config.paths) for part in (Part.llm, Part.vision)
    }
    present = {part: folder for part, folder in weights.items() if folder is not None}
    try:
        on_meta = build_on_meta(config)
        tokenizer = load_tokenizer(config.llm, present[Part.llm]) if Part.llm in present else None
    except Exception as error:  # parts are foreign code
        yield failed("parts", "build", error)
        return
    for part, folder in weights.items():
        chosen = getattr(config, part.name).weights
        if folder is not None:
            yield shown("weights", part.name, str(folder))
        elif chosen.folder is not None:  # named, so meant
            yield failed("weights", part.name, WeightsError(absence(chosen, config.paths)))
        else:
            yield skipped("weights", part.name, absence(chosen, config.paths))
    if tokenizer is None:
        yield skipped("tokenizer", "all", "comes with the LLM's weights")
    else:
        yield from until_error("tokenizer", "all", partial(examine_tokenizer, config, tokenizer))
        for step in TRAIN_STEPS:
            visual = on_meta.vision.num_visual_tokens
            examine_text = partial(examine_format, config, step, tokenizer, visual)
            yield from until_error(f"{step.name} text", "all", examine_text)
    yield from until_error("sizes", "all", partial(examine_sizes, config, on_meta))
    for step in TRAIN_STEPS:
        yield from until_error(step.name, "positions", partial(_examine_positions, config, step))
        examine_pixels = partial(examine_image, config, step, on_meta.vision.image_size)
        yield from until_error(step.name, "image", examine_pixels)
    if Part.vision in present:
        published = partial(examine_published, config, present[Part.vision])
        yield from until_error("image", "published settings", published)
    yield from until_error("model", "run", partial(_examine_run, config, present, on_meta, tokenizer))
    for step in TRAIN_STEPS:
        yield from until_error(step.name, "cost", partial(_price, config, step))


def _examine_positions(config: Config, step: Step) -> Iterator[Finding]:
    length = recipe_of(config, step)[0].max_length
    check_max_length(config.llm, length, f"stage.{step.name}.max_length")
    made_for = llm_shape(config).get("max_position_embeddings")
    if made_for is not None and length > made_for:
        yield shown(step.name, "positions", f"max_length={length}, the LLM was made for {made_for}")
    else:
        yield judged(step.name, "positions", True, f"max_length={length} of {made_for or 'any number of'}")


def _examine_run(
    config: Config, present: Mapping[Part, Path], on_meta: MLLM, tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[Finding]:
    built = build_for_real(config, present, on_meta)
    yield shown("model", "computed with", built.origin)
    if not built.is_meta:
        text_only = _batches(config, Step.finetune, built, tokenizer)[1]
        yield from examine_scale(built, text_only)
        yield from examine_attention(built, text_only)
    for step in TRAIN_STEPS:
        batches = _batches(config, step, built, tokenizer)
        yield from examine_step(step, built, *batches, trained=recipe_of(config, step)[0].trainable)


def _price(config: Config, step: Step) -> Iterator[Finding]:
    model, recipe = sizes(config), recipe_of(config, step)[0]
    text, supervised = PRICED[step]
    length = model.num_visual_tokens + text
    flops = sample_flops(model, length, 1, supervised, recipe.trainable)
    share = model.vision_image / flops
    yield shown(
        step.name,
        "FLOPs a sample",
        f"{_short(flops)} at {length} tokens, {supervised} supervised; {share:.0%} of it the vision encoder",
    )
    bytes_ = memory(config, length, 1, supervised, recipe.trainable)
    known = "" if is_counted(llm_shape(config)["model_type"]) else "; counted as a Llama"
    other = "" if recipe.precision is Precision.bf16 else f"; this step is {recipe.precision.name}: more"
    yield shown(
        step.name,
        "memory",
        f"{_short(bytes_.state)}B for weights, gradients and optimizer, {_short(bytes_.sample)}B for each "
        f"such sample of a micro-batch (in bf16{other}{known})",
    )


def _batches(
    config: Config, step: Step, built: Built, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[Batch, Batch, Batch]:
    """A sample with an image, one without, and both packed."""
    mllm, recipe = built.mllm, recipe_of(config, step)[0]
    visual, chat = mllm.vision.num_visual_tokens, chat_format(config, step)
    if tokenizer is None:
        image, text = _synthetic(visual), _synthetic(0)
    else:
        image = chat.encode(PROBES[step], tokenizer, visual, recipe.max_length)
        text = chat_format(config, Step.finetune).encode(TEXT_ONLY, tokenizer, visual, recipe.max_length)
    pixels = [processor_of(config, step, mllm.vision.image_size)(probe_image())]
    rows: Sequence[tuple[list[Encoded], list[np.ndarray]]] = [
        ([image], pixels),
        ([text], []),
        ([image, text], pixels),
    ]
    made = [
        collate(encoded, images, range(len(encoded)), 1, mllm.vision.image_size) for encoded, images in rows
    ]
    first, second, third = (_placed(batch, mllm) for batch in made)
    return first, second, third


def _placed(batch: Batch, mllm: MLLM) -> Batch:
    device = mllm.llm.device
    moved = Batch(*(tensor.to(device) for tensor in batch))
    supervised = torch.tensor(len(batch.targets))
    # borders are read as Python integers
    return moved._replace(cu_seqlens=batch.cu_seqlens, num_supervised=supervised)


def _synthetic(num_visual_tokens: int) -> Encoded:
    text, supervised = _PROBE_LENGTH
    total = num_visual_tokens + text
    return Encoded(
        np.arange(total, dtype=np.int32) % 7 + 1,
        np.arange(total) >= total - supervised,
        np.arange(total) < num_visual_tokens,
        False,
    )


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f} "
