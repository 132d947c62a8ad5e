"""How many tokens a train step reads: counted by `data check`, or assumed. No torch, no tokenizer."""

from dataclasses import dataclass, replace

from morebench.config.compose import load_chat_format, load_shape
from morebench.config.schema import Config, Step, TrainingData, TrainRecipe
from morebench.config.visual import num_visual_tokens
from morebench.data.chat import ChatFormat
from morebench.data.checked import Manifest
from morebench.data.checking.lengths import length_name
from morebench.data.packing import num_optimizer_steps

# The longest text among samples whose usual length is all that is known, in usual lengths.
_LONGEST = 4


@dataclass(frozen=True)
class Reading:
    """Sums over the samples that a train step reads; a sample read twice counts twice."""

    samples: float
    tokens: float  # visual ones included
    squared_lengths: float
    images: float
    supervised: float
    longest: int  # tokens of a sample, visual ones included
    is_counted: bool


def reading(llm: str, config: Config, step: Step, manifest: Manifest | None) -> Reading | None:
    """Of the whole step. None where nobody has counted and the data choice assumes nothing.

    llm: the choice. manifest: of the check of this step's data, if there is one that holds.
    """
    recipe = config.stage.pretrain if step is Step.pretrain else config.stage.finetune
    data = config.pretrain_data if step is Step.pretrain else config.finetune_data
    visual = num_visual_tokens(load_shape(config.vision.shape))
    found = _counted(llm, config, recipe, visual, manifest) or _assumed(data, recipe, visual)
    if found is None:
        return None
    there = found.samples if manifest is None else manifest.num_samples
    if manifest is None and data.num_samples is not None:
        there = data.num_samples
    trained_on = max(1, there - recipe.validation_samples)
    steps = num_optimizer_steps(int(trained_on), recipe.global_batch_size, recipe.epochs, recipe.max_steps)
    read = min(steps * recipe.global_batch_size, trained_on * recipe.epochs)
    return _scaled(found, read / found.samples)


def _counted(
    llm: str, config: Config, recipe: TrainRecipe, visual: int, manifest: Manifest | None
) -> Reading | None:
    if manifest is None:
        return None
    chat = ChatFormat.from_dict(load_chat_format(recipe.chat_format or config.llm.chat_format)).label
    facts = manifest.tokens.get(length_name(llm, chat, visual, recipe.max_length))
    if facts is None or "squared_lengths" not in facts:  # an older check summed less
        return None
    return Reading(
        samples=manifest.num_samples,
        tokens=facts["tokens"],
        squared_lengths=facts["squared_lengths"],
        images=facts["images"],
        supervised=facts["supervised"],
        longest=facts["quantiles"]["100"],
        is_counted=True,
    )


def _assumed(data: TrainingData, recipe: TrainRecipe, visual: int) -> Reading | None:
    if not data.assumed_lengths:
        return None
    kinds = [
        (kind, min(recipe.max_length, kind.images * visual + kind.text_tokens))
        for kind in data.assumed_lengths
    ]
    longest = max(kind.images * visual + _LONGEST * kind.text_tokens for kind, _ in kinds)
    return Reading(
        samples=sum(kind.samples for kind, _ in kinds),
        tokens=sum(kind.samples * length for kind, length in kinds),
        squared_lengths=sum(kind.samples * length**2 for kind, length in kinds),
        images=sum(kind.samples * kind.images for kind, _ in kinds),
        supervised=sum(kind.samples * kind.supervised for kind, _ in kinds),
        longest=min(recipe.max_length, longest),
        is_counted=False,
    )


def _scaled(one: Reading, factor: float) -> Reading:
    return replace(
        one,
        samples=one.samples * factor,
        tokens=one.tokens * factor,
        squared_lengths=one.squared_lengths * factor,
        images=one.images * factor,
        supervised=one.supervised * factor,
    )
