"""A whole cell on disk, small enough to train in a second: records, images, starting weights, config."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from factories_data import paths_below, tokenizer_for
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from morebench.config.schema import (
    LLM,
    AspectRatio,
    Attention,
    Config,
    EvaluateRecipe,
    Features,
    ImageProcessing,
    Interpolation,
    LossKernel,
    Optimizer,
    Order,
    Part,
    Precision,
    Profile,
    Projector,
    Resize,
    Resolution,
    Stage,
    Strategy,
    Suite,
    Tracking,
    Trainer,
    TrainingData,
    TrainRecipe,
    UncheckedData,
    Vision,
    VisualScale,
    Weights,
)
from morebench.data.checking.check import check_data
from morebench.models.llm import llm_config
from morebench.models.vision import OpenClipEncoder

VISION_SHAPE = {"image_size": 24, "patch_size": 8, "width": 16, "blocks": 3, "heads": 2, "mlp_dim": 32}
VISION_SHAPE |= {"prefix_tokens": 1, "activation": "quick_gelu", "norm_eps": 1e-5}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.1}
LLM_SHAPES: dict[str, dict[str, Any]] = {
    # soft-cap and a window shorter than a sample, so that a wrong mask shows
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
    | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
}
CHAT_FORMATS = {"gemma2": "gemma_2", "llama": "llama_3_1"}
NUM_SAMPLES = 44
GLOBAL_BATCH = 16  # 44 samples: two full batches and one of 12


def make_cell(root: Path, family: str = "gemma2") -> Config:
    """Write everything below `root` and return the config that trains on it: 2 epochs of 3 steps."""
    _write_data(root / "data" / "toy")
    torch.manual_seed(7)
    vision = root / "weights" / "tiny" / "vision"
    vision.mkdir(parents=True)
    whole = OpenClipEncoder(VISION_SHAPE, None, feature_layer=-1)
    save_file(
        {key: value.contiguous() for key, value in whole.model.state_dict().items()}, vision / "v.safetensors"
    )
    (vision / "config.json").write_text(json.dumps(VISION_SHAPE))
    _write_shape(root, "vision", VISION_SHAPE)
    tokenizer = tokenizer_for(CHAT_FORMATS[family])
    shape = {"model_type": family, "vocab_size": len(tokenizer)} | _SIZES | LLM_SHAPES[family]
    _write_shape(root, "llm", shape)
    llm = root / "weights" / "tiny" / "llm"
    AutoModelForCausalLM.from_config(llm_config(shape), dtype=torch.float32).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    config = _config(root, family)
    check_data(config.pretrain_data, config.paths, 0, lambda text: None)
    return config


def with_trainer(config: Config, **changes: Any) -> Config:
    return replace(config, trainer=replace(config.trainer, **changes))


def with_recipe(config: Config, **changes: Any) -> Config:
    """Changes both train recipes."""
    stage = config.stage
    return replace(
        config,
        stage=replace(
            stage, pretrain=replace(stage.pretrain, **changes), finetune=replace(stage.finetune, **changes)
        ),
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def _write_data(folder: Path) -> None:
    """Images with one and several turns, text-only samples, answers of very different lengths."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(NUM_SAMPLES):
        turns = [("What colour?", f"{number} " + "red " * (number % 9)), ("Sure?", "Yes.")][: 1 + number % 2]
        record: dict[str, Any] = {"id": f"s{number}"}
        if number % 4:
            name = f"{number}.png"
            Image.new("RGB", (30 + number, 25), (5 * number, 250 - 5 * number, 99)).save(
                folder / "images" / name
            )
            record["image"] = name
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        record["conversations"] = [
            {"from": role, "value": text}
            for turn in turns
            for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))


def _write_shape(root: Path, name: str, shape: dict[str, Any]) -> None:
    (root / f"{name}.json").write_text(json.dumps(shape))


def _config(root: Path, family: str) -> Config:
    data = TrainingData(
        label="Toy",
        folder="toy",
        records="records.json",
        images="images",
        allowed_links=[],
        also_quarantine=[],
        num_samples=NUM_SAMPLES,
        assumed_lengths=[],
        build=None,
    )
    finetune = _recipe([Part.projector, Part.llm])
    return Config(
        llm=LLM(
            label="Tiny",
            size_group="Tiny",
            weights=Weights(folder=None, hub_id="tiny/llm", revision=None, build=None),
            shape=str(root / "llm.json"),  # an absolute path wins over conf/shapes
            chat_format=CHAT_FORMATS[family],
            pad_token={"gemma2": "<pad>", "llama": "<|finetune_right_pad_id|>"}[family],
            visual_scale=VisualScale.sqrt_hidden if family == "gemma2" else VisualScale.one,
        ),
        vision=Vision(
            label="Tiny",
            weights=Weights(folder=None, hub_id="tiny/vision", revision=None, build=None),
            shape=str(root / "vision.json"),
            feature_layer=-2,
            encoder={"_target_": "morebench.models.vision.OpenClipEncoder", "name": None},
            image=ImageProcessing(
                resize=Resize.shortest_edge,
                resize_to=24,
                interpolation=Interpolation.bicubic,
                mean=[0.5, 0.5, 0.5],
                std=[0.5, 0.5, 0.5],
            ),
        ),
        resolution=Resolution(label="Native", scales=[1]),
        pretrain_data=data,
        finetune_data=data,
        stage=Stage(
            steps=[],
            pretrain=_recipe([Part.projector]),
            finetune=finetune,
            evaluate=EvaluateRecipe(
                profile=Profile.paper,
                image_aspect_ratio=AspectRatio.pad,
                precision=Precision.fp32,
                controls=[],
            ),
        ),
        suite=Suite(label="None", tasks={}, columns=[]),
        projector=Projector(depth=2),
        trainer=Trainer(
            accelerator="cpu",
            devices=1,
            num_nodes=1,
            strategy=Strategy.auto,
            num_workers=0,
            threads=1,
            micro_batch_tokens=100_000,
            recompute=None,
            attention=Attention.auto,
            loss_kernel=LossKernel.auto,
            compile=None,
            checkpoint_every_n_steps=2,
            checkpoint_every_n_minutes=60,
            hang_timeout_minutes=5,
            gpu=None,
            usd_per_gpu_hour=None,
            evaluate_batch_size=8,
            evaluate_cache_gib=None,
            flip_sample=0,
        ),
        tracking=Tracking(uri=None, experiment="test"),
        paths=paths_below(root),
        seed=0,
        unchecked_data=UncheckedData.refuse,
        download=False,
        max_quarantined=0.0,
        features=Features.computed,
        parent=None,
        experiments=None,
    )


def _recipe(trainable: list[Part]) -> TrainRecipe:
    return TrainRecipe(
        trainable=trainable,
        chat_format=None,
        image_aspect_ratio=AspectRatio.pad,
        max_length=400,
        global_batch_size=GLOBAL_BATCH,
        epochs=2,
        max_steps=None,
        warmup_ratio=0.2,
        optimizer=Optimizer(lr=2e-3, weight_decay=0.0, betas=[0.9, 0.999], eps=1e-8),
        gradient_clip_val=1.0,
        max_skipped_steps=0,
        validation_samples=0,
        order=Order.uniform,
        precision=Precision.fp32,
    )
