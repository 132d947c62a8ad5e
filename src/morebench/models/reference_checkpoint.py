"""Tensors of a published LLaVA-style checkpoint, dealt to the parts of a cell with nothing left over.

Names: `model.mm_projector.*`, `model.vision_tower.vision_tower.*` (as transformers saves the tower), and the
LLM's own for all the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from morebench.config.compose import load_shape
from morebench.config.schema import Config, Part, Step
from morebench.models.llm import llm_config
from morebench.models.parts import tied_copies
from morebench.models.projector import MLPProjector
from morebench.models.vision import TransformersEncoder

PROJECTOR_PREFIX = "model.mm_projector."
TOWER_PREFIX = "model.vision_tower.vision_tower."

# Ends of names that older versions of transformers saved and today's compute.
_COMPUTED = {
    ".rotary_emb.inv_freq": "rotary frequencies, computed",
    ".embeddings.position_ids": "position ids, counted",
}
_TIED = "a second copy of the tied embeddings"


@dataclass
class Dealt:
    """What each part gets, under the part's own names. The tower's are as published."""

    parts: dict[Part, dict[str, Tensor]] = field(default_factory=dict)
    tower: PretrainedConfig | None = None  # of the stored vision tower
    ignored: dict[str, int] = field(default_factory=dict)  # reason -> number of tensors
    problems: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For the manifest and for a reader: number of tensors taken per part, and left out per reason."""
        return {
            "taken": {part.name: len(tensors) for part, tensors in self.parts.items()},
            "ignored": self.ignored,
        }

    def ignore(self, reason: str) -> None:
        self.ignored[reason] = self.ignored.get(reason, 0) + 1


def deal(tensors: Mapping[str, Tensor], config: Config, step: Step) -> Dealt:
    """Every tensor to its part; whatever is missing, left over or of another shape is a problem."""
    dealt = Dealt()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        computed = next((reason for end, reason in _COMPUTED.items() if name.endswith(end)), None)
        if computed is not None:
            dealt.ignore(computed)
        else:
            kept[name] = tensor
    projector = _below(kept, PROJECTOR_PREFIX)
    _deal_projector(projector, config, dealt)
    if step is Step.pretrain:
        dealt.problems += [f"{name}: surplus, a projector's file holds nothing else." for name in kept]
        return dealt
    tower = _below(kept, TOWER_PREFIX)
    if tower:
        _deal_tower(tower, config, dealt)
    _deal_llm(kept, config, dealt)
    return dealt


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take what lies below `prefix` out of `tensors`; names without the prefix."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _deal_projector(found: dict[str, Tensor], config: Config, dealt: Dealt) -> None:
    vision_dim = load_shape(config.vision.shape)["width"] * len(config.resolution.scales)
    llm_dim = llm_config(load_shape(config.llm.shape)).hidden_size
    with torch.device("meta"):
        wanted = MLPProjector(vision_dim, llm_dim, config.projector.depth).state_dict()
    dealt.problems += _differences(found, wanted, Part.projector, PROJECTOR_PREFIX)
    dealt.parts[Part.projector] = found


def _deal_llm(found: dict[str, Tensor], config: Config, dealt: Dealt) -> None:
    shape = llm_config(load_shape(config.llm.shape))
    shape.pad_token_id = None  # a default of transformers that small vocabularies lack; it fixes no shape
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(shape)
    tied = tied_copies(llm)
    (embeddings,) = (
        name for name, value in llm.named_parameters() if value is llm.get_input_embeddings().weight
    )
    for name in tied & found.keys():
        copy = found.pop(name)
        if embeddings in found and torch.equal(copy, found[embeddings]):
            dealt.ignore(_TIED)
        else:
            dealt.problems.append(
                f"{name}: differs from {embeddings}, but the cell's llm has one matrix for both. Choose an "
                "llm whose shape has tie_word_embeddings false."
            )
    wanted = {name: value for name, value in llm.state_dict().items() if name not in tied}
    dealt.problems += _differences(found, wanted, Part.llm, "")
    dealt.parts[Part.llm] = found


def _deal_tower(found: dict[str, Tensor], config: Config, dealt: Dealt) -> None:
    """transformers itself tells whether the tower fits: it knows every name it ever gave to a tensor."""
    model_type = _tower_type(found)
    shape = load_shape(config.vision.shape)
    with torch.device("meta"):  # -1: with every block, as the checkpoint has them
        whole = TransformersEncoder(shape, None, feature_layer=-1, name=model_type)
    tower_config = dealt.tower = whole.model.config
    tower_config.vision_use_head = any(name.startswith(("head.", "vision_model.head.")) for name in found)
    _, report = type(whole.model).from_pretrained(
        None,
        config=tower_config,
        state_dict=dict(found),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype="auto",
    )
    what = f"a {model_type} of the cell's vision shape"
    for name in sorted(report["missing_keys"]):
        dealt.problems.append(f"{TOWER_PREFIX}{name}: missing, {what} needs it.")
    for name in sorted(report["unexpected_keys"]):
        dealt.problems.append(f"{TOWER_PREFIX}{name}: surplus, {what} has none.")
    for name, saved, wanted in sorted(report["mismatched_keys"]):
        dealt.problems.append(f"{TOWER_PREFIX}{name}: shape {list(saved)}, {what} has {list(wanted)}.")
    dealt.parts[Part.vision] = found


def _tower_type(found: Mapping[str, Tensor]) -> str:
    """Read off the kinds of embeddings, which differ between the towers that the study used."""
    if any(name.endswith("embeddings.register_tokens") for name in found):
        return "dinov2_with_registers"
    if any(name.endswith("embeddings.cls_token") for name in found):
        return "dinov2"
    if any(name.endswith("embeddings.class_embedding") for name in found):
        return "clip_vision_model"
    return "siglip_vision_model"


def _differences(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], part: Part, prefix: str
) -> list[str]:
    problems = [f"{prefix}{name}: missing, the {part.name} needs it." for name in wanted if name not in found]
    problems += [f"{prefix}{name}: surplus, no part has it." for name in found if name not in wanted]
    return problems + [
        f"{prefix}{name}: shape {list(found[name].shape)}, the cell's {part.name} has {list(tensor.shape)}."
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
