"""A finished finetune run as a folder that `LlavaForConditionalGeneration.from_pretrained` reads."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from morebench.config.compose import load_chat_format, load_config, load_shape
from morebench.config.schema import Config, Part, Precision
from morebench.data.chat import ChatFormat
from morebench.data.jinja_template import chat_template
from morebench.errors import ConfigError, RunError, join_problems
from morebench.models.llm import load_tokenizer
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, load_part
from morebench.models.transformers_processor import check_ids, make_processor, with_image_token
from morebench.models.transformers_readme import readme
from morebench.models.vision_layouts import as_transformers, select_strategy
from morebench.models.weights import starting_weights


@dataclass(frozen=True)
class _Export:
    """Both halves of the folder."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    readme: str


def export(run: Path, folder: Path) -> None:
    """Write the model of `run`, a finished finetune run's folder, into `folder`, which must hold nothing yet.

    The weights are those that were scored: fp32, or rounded to bf16 where `stage.evaluate.precision` is bf16.
    Written aside and renamed. Raises RunError for a run that is not finished, ConfigError for a cell that
    LlavaForConditionalGeneration cannot express, WeightsError for missing or misfitting weights.
    """
    config = _read_run(run)
    _check_config(config, folder)
    with _aside(folder) as draft:  # before the work, so that a place that cannot be written says so at once
        made = _make(config, run)
        made.model.save_pretrained(draft)
        made.processor.save_pretrained(draft)
        readme = draft / "README.md"
        readme.write_text(made.readme)
        for file in draft.glob("*.safetensors"):
            shutil.copymode(readme, file)  # safetensors writes for the owner alone


def _read_run(run: Path) -> Config:
    if not (run / "manifest.json").is_file() or not (run / "config.yaml").is_file():
        raise RunError(f"{run} is no run folder: it has no manifest.json and config.yaml.")
    try:
        step = json.loads((run / "manifest.json").read_text()).get("step")
    except ValueError as error:
        raise RunError(f"{run / 'manifest.json'} is damaged: {error}") from error
    if step != "finetune":
        raise RunError(
            f"{run} is the {step} step of a cell; a model is exported from its finetune run (parents.json)."
        )
    config = load_config(run / "config.yaml")
    files = [f"{part.name}.safetensors" for part in _trained(config)]
    if missing := [name for name in files if not (run / name).is_file()]:
        raise RunError(f"{run} has no {', '.join(missing)}: it has not finished. See morebench.status.")
    return config


def _trained(config: Config) -> list[Part]:
    """What a finetune run must hold: the projector, and what it trained."""
    return list(dict.fromkeys([Part.projector, *config.stage.finetune.trainable]))


def _check_config(config: Config, folder: Path) -> None:
    """Raise one ConfigError for all that can be said before anything is loaded."""
    problems = []
    if config.resolution.scales != [1]:
        problems.append(
            f"resolution: scales {config.resolution.scales} send an image through the encoder once per scale "
            "and join the features by channel. LlavaForConditionalGeneration encodes it once, so there is no "
            "folder to write. Export a resolution=native cell, or use this one through morebench."
        )
    if config.projector.depth != 2:
        problems.append(
            f"projector.depth: LlavaForConditionalGeneration's projector has 2 layers, this one "
            f"{config.projector.depth}."
        )
    try:
        select_strategy(load_shape(config.vision.shape)["prefix_tokens"])
    except ConfigError as error:
        problems.append(str(error))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"out: {folder} exists and is not empty. Choose another folder, or delete it.")
    if problems:
        raise ConfigError(join_problems(problems))


def _make(config: Config, run: Path) -> _Export:
    weights = starting_weights(config)
    tokenizer = load_tokenizer(config.llm, weights[Part.llm])
    recipe = config.stage.evaluate
    # as evaluation loads it; only the projector stays fp32, because a factor may be folded into it
    mllm = build_mllm(config, weights, recipe.precision, trainable=[Part.projector])
    for part in _trained(config):
        load_part(mllm, part, run / f"{part.name}.safetensors")
    shape: dict[str, Any] = load_shape(config.vision.shape)
    chat_format = config.stage.finetune.chat_format or config.llm.chat_format
    chat = ChatFormat.from_dict(load_chat_format(chat_format))
    own = with_image_token(tokenizer, chat)
    template = chat_template(chat, own)
    encoder: Any = mllm.get_submodule("vision")
    processor = make_processor(
        template, own, config.vision.image, recipe.image_aspect_ratio, encoder, shape["patch_size"]
    )
    check_ids(processor, chat, tokenizer, encoder.num_visual_tokens, template.exact_history)
    dtype = torch.bfloat16 if recipe.precision is Precision.bf16 else torch.float32
    model = to_llava(mllm, shape, processor.image_token_id, dtype)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=chat.end_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=_max_new_tokens(config),
    )
    return _Export(model, processor, readme(config, run.name, model, processor, template.exact_history))


def _max_new_tokens(config: Config) -> int | None:
    """The longest answer that a task of the suite may have; None: transformers' default."""
    profile = config.stage.evaluate.profile.name
    return max((task.max_new_tokens[profile] for task in config.suite.tasks.values()), default=None)


@torch.no_grad()
def to_llava(
    mllm: MLLM, vision_shape: dict[str, Any], image_token_id: int, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """Shares the LLM's memory where the dtype allows. Raises ConfigError for an LLM without a counterpart."""
    head = mllm.llm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"llm: the head of {type(mllm.llm).__name__} has a bias. LlavaForConditionalGeneration's has "
            "none, so every logit would differ."
        )
    vision: Any = mllm.get_submodule("vision")
    tower = as_transformers(vision, vision_shape)
    vocab_size = max(mllm.llm.config.vocab_size, image_token_id + 1)
    state = {f"model.vision_tower.{key}": tensor for key, tensor in tower.state_dict().items()}
    state |= _projector(mllm)
    state |= {
        f"model.language_model.{key}": tensor for key, tensor in mllm.llm.base_model.state_dict().items()
    }
    embeddings = "model.language_model.embed_tokens.weight"
    state[embeddings] = with_mean_row(state[embeddings], image_token_id, vocab_size)
    tied = head.weight is mllm.llm.get_input_embeddings().weight
    state["lm_head.weight"] = (
        state[embeddings] if tied else with_mean_row(head.weight, image_token_id, vocab_size)
    )
    config = _config(mllm, tower, vocab_size, image_token_id, dtype)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    wanted = {key: tensor.to(dtype) for key, tensor in state.items()}
    found = model.load_state_dict(wanted, strict=False, assign=True)
    if found.missing_keys or found.unexpected_keys:
        problems = [f"{key}: the cell has no such tensor" for key in found.missing_keys]
        problems += [f"{key}: no place for it" for key in found.unexpected_keys]
        name = type(model.model.language_model).__name__
        raise ConfigError(join_problems([f"llm: {type(mllm.llm).__name__} is no {name}:", *problems]))
    model.tie_weights()
    return model.eval()


def _projector(mllm: MLLM) -> dict[str, Tensor]:
    """Our factor on visual tokens goes into the last layer: LLaVA has none, and Gemma-2 does not scale what
    comes in as `inputs_embeds`."""
    first, _, last = mllm.projector
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    prefix = "model.multi_modal_projector.linear"
    return {
        f"{prefix}_1.weight": first.weight,
        f"{prefix}_1.bias": first.bias,
        f"{prefix}_2.weight": last.weight * mllm.visual_scale,
        f"{prefix}_2.bias": last.bias * mllm.visual_scale,
    }


def with_mean_row(weight_ZD: Tensor, row: int, num_rows: int) -> Tensor:
    """`weight_ZD` with `num_rows` rows, where `row` and all new ones are the mean of the others.

    As a row of the head its logit is the mean of the others' logits, so it is never the largest: no greedy
    answer holds an image token. A zero row would win wherever all logits are negative.
    """
    old, total_D = len(weight_ZD), weight_ZD.sum(0, dtype=torch.float32)  # an fp32 copy may take gigabytes
    mean_D = (total_D - weight_ZD[row]) / (old - 1) if row < old else total_D / old
    extended_ZD = torch.cat([weight_ZD, weight_ZD.new_empty(num_rows - old, weight_ZD.shape[1])])
    extended_ZD[[row, *range(old, num_rows)]] = mean_D.to(weight_ZD.dtype)
    return extended_ZD


def _config(
    mllm: MLLM, tower: PreTrainedModel, vocab_size: int, image_token_id: int, dtype: torch.dtype
) -> LlavaConfig:
    vision: Any = mllm.get_submodule("vision")
    text_config, vision_config = copy.deepcopy(mllm.llm.config), copy.deepcopy(tower.config)
    text_config.vocab_size = vocab_size
    for config in (text_config, vision_config):
        config._attn_implementation = None  # ours is for training only; transformers chooses
        config._name_or_path = ""  # a folder of this machine
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=vision.num_visual_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,  # the tower ends there
        vision_feature_select_strategy=select_strategy(vision.num_prefix_tokens),
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtype,
    )


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which it becomes when all went well."""
    draft = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"out: {folder} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield draft
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
