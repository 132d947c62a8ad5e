"""Tiny real models with random weights, prompts for them, and tasks on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories_vision import normalise_of
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Profile, Task, TaskData
from morebench.data.chat import ChatFormat
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.projector import MLPProjector
from morebench.models.vision import OpenClipEncoder

VISION_SHAPE: dict[str, Any] = {
    "image_size": 24,
    "patch_size": 8,
    "width": 16,
    "blocks": 2,
    "heads": 2,
    "mlp_dim": 32,
}
VISION_SHAPE |= {"prefix_tokens": 1, "activation": "quick_gelu", "norm_eps": 1e-5}
NUM_ITEMS = 20
CLASSES = {"vqa": "gqa.GQA", "pope": "pope.POPE", "mc": "ai2d.AI2D"}
CHAT_FORMATS = {"gemma2": "gemma_2", "phi3": "phi_4", "llama": "llama_3_1"}
FAMILIES = tuple(CHAT_FORMATS)

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
_OWN: dict[str, dict[str, Any]] = {
    # The window is shorter than the 9 visual tokens of an image. With a tied head, random weights repeat the
    # last token for ever.
    "gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    | {"tie_word_embeddings": False},
    "phi3": {"pad_token_id": 0},
    "llama": {"head_dim": 8},
}


def llm_shape(family: str, vocab_size: int) -> dict[str, Any]:
    # A wide start, so that answers depend on image and question instead of the last token alone.
    return {"model_type": family, "vocab_size": vocab_size, "initializer_range": 0.4} | _COMMON | _OWN[family]


def byte_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the control tokens of the family's chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    raw = load_chat_format(CHAT_FORMATS[family])
    control = [segment["token"] for segment in [*(raw["start"] or []), *raw["turn"]] if "token" in segment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    names = [token for token in dict.fromkeys([*control, *raw.get("stop", [])]) if token != "{bos}"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


def tiny_mllm(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> MLLM:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = llm_config(llm_shape(family, len(tokenizer)) | changes)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=VARLEN)
    with torch.no_grad():  # less of the last token, more of what it attends to
        llm.get_input_embeddings().weight.mul_(0.1)
    encoder = OpenClipEncoder(VISION_SHAPE, None, feature_layer=-2)
    projector = MLPProjector(encoder.feature_dim, config.hidden_size, 2)
    mllm = MLLM(normalise_of("clip_tiny"), encoder, projector, llm, visual_scale=4.0)
    return mllm.eval().requires_grad_(False)


def chat_format(family: str) -> ChatFormat:
    return ChatFormat.from_dict(load_chat_format(CHAT_FORMATS[family]))


def questions(seed: int) -> Iterator[str]:
    """Short and long ones, without an image, with one, with two."""
    generator = np.random.default_rng(seed)
    while True:
        text = bytes(generator.integers(97, 123, generator.integers(1, 25))).decode()
        yield "<image>" * generator.choice([0, 1, 1, 1, 2]) + text


def make_task(folder: Path, name: str, generator: np.random.Generator) -> Task:
    records: list[dict[str, Any]] = []
    for number in range(NUM_ITEMS):
        image = f"noise{generator.integers(8)}.png"
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image)
        question = "Is it " + "very " * int(generator.integers(0, 6)) + f"red, {number}?"
        record = {"id": f"{name}{number}", "image": image, "question": question, "answer": "yes"}
        if name == "mc":
            record |= {"answer": str(number % 2), "options": ["red", "blue"]}
        records.append(record)
    (folder / f"{name}.json").write_text(json.dumps(records))
    place = TaskData(
        hub_id=None,
        also_at=None,
        config=None,
        image_config=None,
        image_field=None,
        split=None,
        revision=None,
        folder="toy",
        records=f"{name}.json",
        images="images",
        allowed_links=[],
        num_rows=NUM_ITEMS,
        build=None,
    )
    code = {"_target_": f"morebench.evaluation.tasks.{CLASSES[name]}"}
    return Task(label=name, data=place, code=code, max_new_tokens={profile.name: 5 for profile in Profile})
