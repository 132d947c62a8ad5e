"""Everything one train step is made of, from a config: data, order, model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Config, Part, Step, TrainingData, TrainRecipe
from morebench.data.chat import ChatFormat
from morebench.data.check import CheckedData, open_data
from morebench.data.datamodule import MicroBatches
from morebench.data.features import FeatureCache
from morebench.data.images import ImageProcessor
from morebench.data.index import LengthIndex, build_index
from morebench.data.packing import BatchPlan, micro_batches_for
from morebench.models.llm import load_tokenizer
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm
from morebench.models.rope import check_max_length
from morebench.models.weights import folder_hash, starting_weights
from morebench.training.features import open_features
from morebench.training.files import sha256


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
        cache = Path(self.config.paths.cache)
        tokenizer = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return build_index(
            self.data.samples,
            self.chat,
            self.tokenizer,
            self.mllm.vision.num_visual_tokens,
            self.recipe.max_length,
            cache,
            f"{self.data.content_hash} {tokenizer} {self.tokenizer.bos_token}",
        )

    def micro_batches(self, world_size: int, micro_batch_tokens: int) -> int:
        return micro_batches_for(
            self.index, **self._order(), world_size=world_size, micro_batch_tokens=micro_batch_tokens
        )

    def plan(self, world_size: int, micro_batches: int) -> BatchPlan:
        return BatchPlan(self.index, **self._order(), world_size=world_size, micro_batches=micro_batches)

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
                "num_records": self.data.num_records,
                "num_samples": len(self.data.samples),
                "tokens": int(self.index.lengths.sum(dtype="int64")),
            },
            "features": {
                "from": self.config.features.name,
                "cache": None if self.features is None else self.features.folder.name,
            },
            "quarantined": [vars(entry) for entry in self.data.quarantined],
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
        }


def make_stage(config: Config, step: Step, parents: Mapping[Step, Path]) -> Stage:
    """Data first: its errors come before seconds of loading weights.

    Raises ConfigError, DataError, WeightsError.
    """
    recipe, data = recipe_of(config, step)
    for one in (Step.pretrain, Step.finetune):  # the later step too, before the first takes hours
        check_max_length(config.llm, recipe_of(config, one)[0].max_length, f"stage.{one.name}.max_length")
    checked = open_data(data, config.paths, config.on_bad_image)
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
        mllm=build_mllm(config, weights, recipe.precision, recipe.trainable, with_vision=features is None),
        features=features,
    )


def _chat_format(config: Config, step: Step) -> ChatFormat:
    recipe, _ = recipe_of(config, step)
    return ChatFormat.from_dict(load_chat_format(recipe.chat_format or config.llm.chat_format))


def recipe_of(config: Config, step: Step) -> tuple[TrainRecipe, TrainingData]:
    if step is Step.pretrain:
        return config.stage.pretrain, config.pretrain_data
    return config.stage.finetune, config.finetune_data
