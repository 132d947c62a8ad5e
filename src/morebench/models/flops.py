"""Useful FLOPs of a training sample: no recompute, no padding, logits at supervised positions only.

From the shape files alone, so that planning prices a cell without torch. A multiply and an add are two; only
matrix products are counted.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from morebench.config.compose import load_shape
from morebench.config.llm_shape import llm_problems
from morebench.config.schema import Config, Part
from morebench.config.visual import built_blocks
from morebench.errors import ConfigError, join_problems

Count = TypeVar("Count", int, float, np.ndarray)

# Model types whose MLP is up and down; all others here have a gate beside up.
_UNGATED = {"phi"}


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights in matrices, and the widths that attention and the head cost by."""

    llm_body: int  # without embeddings and head
    llm_layers: int
    llm_width: int
    attention_width: int  # heads x head_dim
    vocab_size: int
    projector: tuple[int, ...]  # per linear layer
    vision_weights: int
    vision_image: int  # FLOPs of one image through the encoder, all tiles
    num_visual_tokens: int


def sizes(config: Config) -> Sizes:
    llm, vision = llm_shape(config), load_shape(config.vision.shape)
    width, scales = llm["hidden_size"], config.resolution.scales
    projector_in = vision["width"] * len(scales)
    return Sizes(
        llm_body=_llm_body(llm),
        llm_layers=llm["num_hidden_layers"],
        llm_width=width,
        attention_width=llm["num_attention_heads"] * head_dim(llm),
        vocab_size=llm["vocab_size"],
        projector=(projector_in * width, *[width * width] * (config.projector.depth - 1)),
        vision_weights=_vision_weights(vision, config.vision.feature_layer),
        vision_image=_vision_image(vision, config.vision.feature_layer, scales),
        num_visual_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


def sample_flops(
    model: Sizes, length: Count, num_images: Count, supervised: Count, trained: Collection[Part]
) -> Count:
    """Forward and backward of one sample, or of many: the three counts may be int64 arrays.

    `length` counts visual tokens too.
    """
    return total_flops(model, length, length * length, num_images, supervised, trained)


def total_flops(
    model: Sizes,
    tokens: Count,
    squared_lengths: Count,
    num_images: Count,
    supervised: Count,
    trained: Collection[Part],
) -> Count:
    """Of samples of which only sums are known. `squared_lengths`: of the samples, what attention costs by.

    A frozen LLM still passes gradients to the projector: it saves only its weight gradients, a third.
    """
    passes = 3 if Part.llm in trained else 2  # forward, gradient of activations, gradient of weights
    body = 2 * passes * model.llm_body * tokens
    attention = 6 * model.attention_width * model.llm_layers * squared_lengths
    head = 2 * passes * model.llm_width * model.vocab_size * supervised
    visual = num_images * model.num_visual_tokens
    first, *rest = model.projector
    projector = (
        (4 * first + 6 * sum(rest)) * visual
        if Part.projector in trained
        else 2 * visual * (first + sum(rest))
    )
    return body + attention + head + projector + model.vision_image * num_images


@dataclass(frozen=True)
class AnswerFlops:
    prefill: float  # encoding images, reading prompts up to the first token of an answer
    decode: float  # every further token of the answers


def answer_flops(
    model: Sizes, images: float, questions: float, text_tokens: float, answer_tokens: float
) -> AnswerFlops:
    """Of greedy answers, every image read once however many questions are about it.

    `images` of all questions together; `text_tokens` of one prompt; `answer_tokens` with the one that ends an
    answer.
    """
    visual = model.num_visual_tokens
    seen = visual * max(1.0, images / questions)  # by a question's tokens; several images, several times that
    body, head = 2 * model.llm_body, 2 * model.llm_width * model.vocab_size
    pair = 4 * model.attention_width * model.llm_layers  # a token that attends to another
    image = model.vision_image + visual * (2 * sum(model.projector) + body + pair * visual / 2)
    prompt = text_tokens * (body + pair * (seen + text_tokens / 2)) + head
    token = body + head + pair * (seen + text_tokens + (answer_tokens - 1) / 2)
    return AnswerFlops(images * image + questions * prompt, questions * (answer_tokens - 1) * token)


def llm_shape(config: Config) -> dict[str, Any]:
    """The LLM's shape, with every field that counting needs. Raises ConfigError for all that are missing."""
    shape = load_shape(config.llm.shape)
    if problems := list(llm_problems(shape)):
        raise ConfigError(join_problems(problems))
    return shape


def head_dim(shape: Mapping[str, Any]) -> int:
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def _llm_body(shape: Mapping[str, Any]) -> int:
    width, per_head = shape["hidden_size"], head_dim(shape)
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = 2 * width * per_head * (heads + groups)
    mlp = (2 if shape["model_type"] in _UNGATED else 3) * width * shape["intermediate_size"]
    return shape["num_hidden_layers"] * (attention + mlp)


def _vision_weights(shape: Mapping[str, Any], feature_layer: int) -> int:
    """Matrices only, as everywhere here."""
    width = shape["width"]
    block = 4 * width * width + 2 * width * shape["mlp_dim"]
    return built_blocks(shape["blocks"], feature_layer) * block + 3 * shape["patch_size"] ** 2 * width


def _vision_image(shape: Mapping[str, Any], feature_layer: int, scales: Sequence[int]) -> int:
    """Forward only, of the blocks that are built."""
    width, blocks = shape["width"], built_blocks(shape["blocks"], feature_layer)
    patches = (shape["image_size"] // shape["patch_size"]) ** 2
    tokens = patches + shape["prefix_tokens"]
    body = blocks * (4 * width * width + 2 * width * shape["mlp_dim"])
    tile = 2 * body * tokens + 4 * blocks * tokens * tokens * width
    embedding = 2 * 3 * shape["patch_size"] ** 2 * width * patches
    return sum(scale**2 for scale in scales) * (tile + embedding)
