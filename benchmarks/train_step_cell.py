"""A cell that two trainers can be timed on: small enough for a CPU, with the proportions that matter.

A Gemma-2 with a vocabulary of 65,536, both soft-caps, a sliding window and a tied head; a CLIP-like encoder
of 144 visual tokens. Captions for pretrain; for finetune conversations of one to eight turns about an image
and, one in sixteen, long ones about none. Lengths as counted for LLaVA-1.5's data, with fewer visual tokens.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from morebench.config.compose import compose_config
from morebench.config.schema import AspectRatio, Config, Step, TrainingData, VisualScale, Weights
from morebench.data.checking.check import check_data
from morebench.models.llm import llm_config
from morebench.models.vision import OpenClipEncoder
from morebench.training.run import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_data import paths_below, tokenizer_for

SEED = 0
NUM_IMAGES = 64
TEXT_ONLY = 16  # one conversation in so many has no image
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz     "))


@dataclass(frozen=True)
class Size:
    image: int
    patch: int
    vocabulary: int
    width: int
    layers: int
    batch: dict[Step, int]  # samples of a global batch
    max_length: int
    lengths: float  # factor on all texts


FULL = Size(84, 7, 65_536, 128, 4, {Step.pretrain: 16, Step.finetune: 16}, 1536, 1.0)
QUICK = Size(28, 7, 65_536, 32, 2, {Step.pretrain: 8, Step.finetune: 4}, 256, 0.1)


def make_cell(root: Path, size: Size, steps: int) -> Config:
    """Write everything below `root`. Returns a config that trains `steps` optimizer steps of each stage."""
    torch.manual_seed(SEED)
    vision, llm = _vision_shape(size), _llm_shape(size)
    tokenizer = tokenizer_for("gemma_2")
    encoder = OpenClipEncoder(vision, None, feature_layer=-1)
    state = {key: value.contiguous() for key, value in encoder.model.state_dict().items()}
    (root / "vision").mkdir()
    save_file(state, root / "vision" / "weights.safetensors")
    AutoModelForCausalLM.from_config(llm_config(llm), dtype=torch.float32).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    config = compose_config(["llm=gemma2_tiny", "vision=clip_tiny", "recipe=digits", "trainer=cpu"]).config
    config = replace(
        config,
        # a factor on visual tokens would have to be folded into the other side's weights, and trained there
        llm=replace(config.llm, weights=_folder(root / "llm"), shape=llm, visual_scale=VisualScale.one),
        vision=replace(
            config.vision,
            weights=_folder(root / "vision"),
            shape=vision,
            image=replace(config.vision.image, resize_to=size.image),
        ),
        pretrain_data=_write(root, "captions", _captions, steps * size.batch[Step.pretrain], size),
        finetune_data=_write(root, "conversations", _conversations, steps * size.batch[Step.finetune], size),
        paths=paths_below(root),
        max_quarantined=0.0,
    )
    stage = config.stage
    config = replace(
        config,
        stage=replace(
            stage,
            pretrain=_recipe(stage.pretrain, size, Step.pretrain),
            finetune=_recipe(stage.finetune, size, Step.finetune),
        ),
    )
    for data in (config.pretrain_data, config.finetune_data):
        check_data(data, config.paths, 0, lambda text: None)
    one_step = replace(config.stage, pretrain=replace(config.stage.pretrain, max_steps=1))
    train(replace(config, stage=one_step), Step.pretrain, root / "parent", {})
    return config


def _recipe(recipe: Any, size: Size, step: Step) -> Any:
    return replace(
        recipe,
        global_batch_size=size.batch[step],
        max_length=size.max_length,
        image_aspect_ratio=AspectRatio.square,
        gradient_clip_val=None,
        warmup_ratio=0.2,
    )


def _folder(path: Path) -> Weights:
    return Weights(folder=str(path), hub_id=None, revision=None, build=None)


def _vision_shape(size: Size) -> dict[str, Any]:
    shape: dict[str, Any] = {"image_size": size.image, "patch_size": size.patch, "width": 128, "blocks": 4}
    shape |= {"heads": 4, "mlp_dim": 512, "prefix_tokens": 1, "activation": "quick_gelu", "norm_eps": 1e-5}
    return shape


def _llm_shape(size: Size) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size.width // 4,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2 * size.max_length,
        "query_pre_attn_scalar": size.width // 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    }


def _write(root: Path, name: str, make: Any, num_samples: int, size: Size) -> TrainingData:
    folder, draw = root / "data" / name, np.random.default_rng(SEED)
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        pixels = draw.integers(0, 256, (size.image, size.image, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    records = []
    for number in range(num_samples):
        image, turns = make(number, draw, size.lengths)
        record: dict[str, Any] = {"id": f"s{number}"}
        if image:
            record["image"] = f"{number % NUM_IMAGES}.png"
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        roles = ("human", "gpt")
        record["conversations"] = [
            {"from": role, "value": text} for turn in turns for role, text in zip(roles, turn, strict=True)
        ]
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    return TrainingData(
        label=name,
        folder=name,
        records="records.json",
        images="images",
        allowed_links=[],
        also_quarantine=[],
        num_samples=num_samples,
        assumed_lengths=[],
        build=None,
    )


_Turns = list[tuple[str, str]]


def _captions(number: int, draw: np.random.Generator, factor: float) -> tuple[bool, _Turns]:
    return True, [("", _text(draw, factor * draw.lognormal(np.log(18), 0.4)))]


def _conversations(number: int, draw: np.random.Generator, factor: float) -> tuple[bool, _Turns]:
    """About 200 tokens with an image and 1,000 without, a half of them answers, with a long tail."""
    has_image = number % TEXT_ONLY != TEXT_ONLY - 1
    num_turns = int(draw.integers(1, 9))
    total = factor * draw.lognormal(np.log(170 if has_image else 850), 0.6)
    shares = draw.dirichlet(np.ones(2 * num_turns)) * total
    return has_image, [
        (_text(draw, question), _text(draw, answer)) for question, answer in shares.reshape(-1, 2)
    ]


def _text(draw: np.random.Generator, length: float) -> str:
    """A token a letter; at least one word."""
    return "a" + "".join(draw.choice(_LETTERS, max(1, round(length)))) + "z"
