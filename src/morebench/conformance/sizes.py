"""What the cells of a matrix weigh and cost, as a page of Markdown."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from morebench.config.compose import Composed, build, load_shape
from morebench.config.schema import Config, Step
from morebench.conformance.cell import PRICED, TRAIN_STEPS
from morebench.models.flops import llm_shape, sample_flops, sizes
from morebench.models.llm import llm_config
from morebench.models.memory import memory
from morebench.progress import track
from morebench.training.stage import recipe_of

_COLUMNS = (
    *("LLM", "vision encoder", "resolution", "visual tokens", "widths"),
    *("LLM parameters", "projector parameters", "vision parameters"),
    *("pretrain TFLOP", "vision share", "state GB", "GB a sample"),
    *("finetune TFLOP", "vision share", "state GB", "GB a sample"),
)
_PAGE = """# What each cell weighs and costs

Written by

```
{command}
```

TFLOP: forward and backward of one sample with an image. Pretrain: {pretrain[0]} text tokens, {pretrain[1]} of
them supervised (a caption); finetune: {finetune[0]} and {finetune[1]} (some turns). Useful work only: no
recompute, no padding, logits at supervised positions, no block behind the features. Widths: of the visual
features and of the LLM. Parameters: of the LLM with embeddings and head (a tied one once), of the projector,
of the vision encoder as far as it is used. State: weights, gradients and optimizer on one device that shards
nothing (trained: fp32 and a bf16 copy; frozen: bf16). GB a sample: what the backward pass of one such sample
waits for; Gemma-2's soft-cap keeps the scores of attention in the loop (as
here), not under flex. 1 GB is 10^9 bytes.

"""


def write_table(cells: Sequence[Composed], file: Path, command: str) -> None:
    """One row a cell, counted from the shapes; parameters on the meta device."""
    rows = [_row(cell) for cell in track(cells, "sizes")]
    header = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * 5 + "---:|" * (len(_COLUMNS) - 5)]
    body = ["| " + " | ".join(row) + " |" for row in rows]
    priced = {step.name: PRICED[step] for step in TRAIN_STEPS}
    page = _PAGE.format(command=command, **priced) + "\n".join([*header, *body])
    file.write_text(f"{page}\n")


def _row(cell: Composed) -> list[str]:
    config, model = cell.config, sizes(cell.config)
    feature_dim = model.projector[0] // model.llm_width
    projector = sum(model.projector) + len(model.projector) * model.llm_width
    row = [cell.choices[axis] for axis in ("llm", "vision", "resolution")]
    row += [str(model.num_visual_tokens), f"{feature_dim} -> {model.llm_width}"]
    row += [
        f"{_llm_parameters(json.dumps(llm_shape(config))):,}",
        f"{projector:,}",
        f"{_vision_parameters(config):,}",
    ]
    for step in TRAIN_STEPS:
        row += _cost(config, step)
    return row


def _cost(config: Config, step: Step) -> list[str]:
    model, trained = sizes(config), recipe_of(config, step)[0].trainable
    text, supervised = PRICED[step]
    length = model.num_visual_tokens + text
    flops = sample_flops(model, length, 1, supervised, trained)
    needed = memory(config, length, 1, supervised, trained)
    return [
        f"{flops / 1e12:.2f}",
        f"{model.vision_image / flops:.0%}",
        f"{needed.state / 1e9:.1f}",
        f"{needed.sample / 1e9:.2f}",
    ]


@cache
def _llm_parameters(shape: str) -> int:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(json.loads(shape)))
    return sum(parameter.numel() for parameter in llm.parameters())


def _vision_parameters(config: Config) -> int:
    vision = config.vision
    return _encoder_parameters(json.dumps([vision.encoder, load_shape(vision.shape), vision.feature_layer]))


@cache
def _encoder_parameters(recipe: str) -> int:
    encoder, shape, feature_layer = json.loads(recipe)
    with torch.device("meta"):
        built = build(encoder, shape=shape, weights=None, feature_layer=feature_layer)
    return sum(parameter.numel() for parameter in built.parameters())
