"""Everything one train step is made of, from a config: data, order, model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Attention, Config, Part, Step, TrainingData, TrainRecipe
from morebench.data.chat import ChatFormat
from morebench.data.checked import CheckedData, changed_images_problem, open_checked
from morebench.data.datamodule import MicroBatches
from morebench.data.features import FeatureCache
from morebench.data.image_processor import ImageProcessor
from morebench.data.index import LengthIndex, index_of
from morebench.data.packing import BatchPlan, micro_batches_for
from morebench.data.validation import validation_slice
from morebench.errors import ConfigError, DataError
from morebench.models.flops import sample_flops, sizes
from morebench.models.llm import load_tokenizer
from morebench.models.memory import image_bytes, memory
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm
from morebench.models.rope import check_max_length
from morebench.models.weights import folder_hash, starting_weights
from morebench.training.features import open_features
from morebench.training.files import sha256
from morebench.training.strategy import creates_sharded


@dataclass(frozen=True)
class Stage:
    config: Config
    recipe: TrainRecipe
    data: CheckedData
    weights: Mapping[Part, Path]
    tokenizer: PreTrainedTokenizerFast
    chat: ChatFormat
    mllm: MLLM
    features: FeatureCache | None = None  # where they are not computed

    @cached_property
    def index(self) -> LengthIndex:
        return index_of(
            self.data.samples,
            self.data.content_hash,
            self.chat,
            self.tokenizer,
            self.mllm.vision.num_visual_tokens,
            self.recipe.max_length,
            Path(self.config.paths.cache),
        )

    @cached_property
    def costs(self) -> np.ndarray:
        """int64 [N]; FLOPs of every sample: what the bins of a global batch are balanced by."""
        lengths, num_images, supervised = self._counts()
        return sample_flops(sizes(self.config), lengths, num_images, supervised, self.recipe.trainable)

    @cached_property
    def flops(self) -> np.ndarray:
        """int64 [N]; what a sample really takes: as `costs`, but with cached features no encoder runs."""
        if self.features is None:
            return self.costs
        lengths, num_images, supervised = self._counts()
        model = replace(sizes(self.config), vision_image=0)
        return sample_flops(model, lengths, num_images, supervised, self.recipe.trainable)

    @cached_property
    def validation(self) -> np.ndarray:
        """int64, ascending: numbers of the samples that are kept out of training. Raises ConfigError."""
        count, total = self.recipe.validation_samples, len(self.data.samples)
        if count >= total:
            raise ConfigError(
                f"validation_samples={count:,} leaves nothing to train on: {self.data.manifest.label} has "
                f"{total:,} usable samples. Choose fewer; 0 trains on all."
            )
        cache = Path(self.config.paths.cache)
        chosen = validation_slice(self.data.samples, count, self.data.content_hash, cache)
        if count and not self.index.supervised[chosen].any():
            raise ConfigError(
                f"validation_samples={count:,}: none of these samples of {self.data.manifest.label} has a "
                f"supervised token within max_length={self.recipe.max_length}, so they have no loss. "
                "Choose more; 0 trains on all."
            )
        return chosen

    @property
    def num_blocks(self) -> int:
        """Of the LLM."""
        return sizes(self.config).llm_layers

    def memory(self, recomputed: int = 0, attention: Attention = Attention.loop) -> np.ndarray:
        """int64 [N]; bytes that every sample keeps on the device: what makes a micro-batch a large one.

        `recomputed` blocks of the LLM are computed twice.
        """
        lengths, num_images, supervised = self._counts()
        kept = memory(
            self.config, lengths, num_images, supervised, self.recipe.trainable, recomputed, attention
        ).sample
        return kept + num_images * image_bytes(self.config)

    def micro_batches(self, world_size: int, micro_batch_tokens: int) -> int:
        return micro_batches_for(
            self.index, **self._order(), world_size=world_size, micro_batch_tokens=micro_batch_tokens
        )

    def plan(self, world_size: int, micro_batches: int) -> BatchPlan:
        return BatchPlan(self.index, **self._order(), world_size=world_size, micro_batches=micro_batches)

    def validation_plan(self, world_size: int, micro_batch_tokens: int) -> BatchPlan:
        """One step, whose global batch is the whole slice."""
        order = self._order() | {
            "global_batch_size": len(self.validation),
            "epochs": 1,
            "max_steps": None,
            "samples": self.validation,
        }
        micro_batches = micro_batches_for(
            self.index, **order, world_size=world_size, micro_batch_tokens=micro_batch_tokens
        )
        return BatchPlan(self.index, **order, world_size=world_size, micro_batches=micro_batches)

    def dataset(self, plan: BatchPlan, rank: int) -> MicroBatches:
        return MicroBatches(
            data=self.data,
            plan=plan,
            chat=self.chat,
            tokenizer=self.tokenizer,
            processor=ImageProcessor(
                self.config.vision.image,
                self.mllm.vision.image_size,
                self.recipe.image_aspect_ratio,
                max(self.config.resolution.scales),
            ),
            num_visual_tokens=self.mllm.vision.num_visual_tokens,
            max_length=self.recipe.max_length,
            rank=rank,
            features=self.features,
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest: what was trained on, and from which weights."""
        cache = Path(self.config.paths.cache)
        return {
            "data": {
                "content_hash": self.data.content_hash,
                "num_records": self.data.manifest.num_records,
                "quarantined": self.data.manifest.quarantined,
                "quarantine_sha256": self.data.manifest.quarantine_sha256,
                "num_samples": len(self.data.samples),
                "validation_samples": len(self.validation),
                "tokens": int(self.index.lengths.sum(dtype="int64")),
            },
            "quarantined": self.data.manifest.num_quarantined,
            "features": {
                "from": self.config.features.name,
                "cache": None if self.features is None else self.features.folder.name,
            },
            "truncated": self.index.truncated,
            "unsupervised": self.index.unsupervised,
            "weights": {
                part.name: folder_hash(path, cache) if path.is_dir() else sha256(path)
                for part, path in self.weights.items()
            },
        }

    def _order(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.recipe.global_batch_size,
            "epochs": self.recipe.epochs,
            "max_steps": self.recipe.max_steps,
            "seed": self.config.seed,
            "order": self.recipe.order,
            "costs": self.costs,
            "samples": np.delete(np.arange(len(self.data.samples)), self.validation),
        }

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = self.index
        lengths, num_images, supervised = (
            counts.astype(np.int64) for counts in (index.lengths, index.num_images, index.supervised)
        )
        return lengths, num_images, supervised


def make_stage(
    config: Config,
    step: Step,
    parents: Mapping[Step, Path],
    is_first: bool = True,
    planned_data: str | None = None,
) -> Stage:
    """Data first: its errors come before seconds of loading weights.

    is_first: whether this rank asks if the images are still those that were checked.
    planned_data: content hash that the run's id was made of.
    Raises ConfigError, DataError, WeightsError.
    """
    recipe, data = recipe_of(config, step)
    for one in (Step.pretrain, Step.finetune):  # the later step too, before the first takes hours
        check_max_length(config.llm, recipe_of(config, one)[0].max_length, f"stage.{one.name}.max_length")
    checked = open_checked(data, config.paths, config.max_quarantined)
    if planned_data not in (None, checked.content_hash):
        raise DataError(
            f"{data.label}: this run was planned for data {planned_data[:12]}, and what is checked now is "
            f"{checked.content_hash[:12]}. Put that data back and check it, or plan again: other data is "
            "another run."
        )
    if is_first and (changed := checked.changed_images()):
        raise DataError(changed_images_problem(data, changed))
    weights = starting_weights(config)
    features = open_features(config, step, recipe, checked, weights[Part.vision])
    if step is Step.finetune:
        weights[Part.projector] = parents[Step.pretrain] / f"{Part.projector.name}.safetensors"
    tokenizer = load_tokenizer(config.llm, weights[Part.llm])
    for one in (Step.pretrain, Step.finetune):
        _chat_format(config, one).check(tokenizer)
    return Stage(
        config=config,
        recipe=recipe,
        data=checked,
        weights=weights,
        tokenizer=tokenizer,
        chat=_chat_format(config, step),
        mllm=build_mllm(
            config,
            weights,
            recipe.precision,
            recipe.trainable,
            with_vision=features is None,
            llm_unread=creates_sharded(config.trainer),
        ),
        features=features,
    )


def _chat_format(config: Config, step: Step) -> ChatFormat:
    recipe, _ = recipe_of(config, step)
    return ChatFormat.from_dict(load_chat_format(recipe.chat_format or config.llm.chat_format))


def recipe_of(config: Config, step: Step) -> tuple[TrainRecipe, TrainingData]:
    if step is Step.pretrain:
        return config.stage.pretrain, config.pretrain_data
    return config.stage.finetune, config.finetune_data
