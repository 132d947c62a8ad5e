# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""Tiny tokenizers with the families' real control tokens, and data sets on disk."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Paths, TrainingData
from morebench.data.chat import ChatFormat

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA_TOKENS += ["<|eot_id|>", "<|finetune_right_pad_id|>"]
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
DEEPSEEK_ROLES = ["<｜User｜>", "<｜Assistant｜>"]  # the published tokenizer does not call these special

FORMATS = ("gemma_2", "phi_4", "llama_3_1", "llama_3", "deepseek_r1", "v1", "phi_2")


def chat_format(stem: str) -> ChatFormat:
    return ChatFormat.from_dict(load_chat_format(stem))


@cache
def tokenizer_for(stem: str) -> PreTrainedTokenizerFast:
    """One id per byte (per character for Vicuna), so that ids can be worked out by hand."""
    if stem == "gemma_2":
        tokens = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
        return _byte_level(tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    if stem == "phi_4":
        tokens: list[Any] = ["<|endoftext|>", "<|system|>", "<|assistant|>", "<|end|>"]
        tokens.append(AddedToken("<|user|>", rstrip=True, special=True))
        return _byte_level(tokens, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if stem in ("llama_3_1", "llama_3"):
        return _byte_level(LLAMA_TOKENS, bos_token=LLAMA_TOKENS[0], eos_token="<|eot_id|>")
    if stem == "deepseek_r1":
        roles = [AddedToken(role, special=False, normalized=False) for role in DEEPSEEK_ROLES]
        tokens = [*DEEPSEEK_TOKENS, *roles]
        return _byte_level(tokens, bos_token=DEEPSEEK_TOKENS[0], eos_token=DEEPSEEK_TOKENS[1])
    if stem == "phi_2":
        return _byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return _metaspace()


def _byte_level(tokens: list[Any], **names: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in tokens:
        plain = isinstance(token, AddedToken) and not token.special
        (tokenizer.add_tokens if plain else tokenizer.add_special_tokens)([token])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _metaspace() -> PreTrainedTokenizerFast:
    """Vicuna's: a space is put in front of every text, and bytes stand in for unknown characters."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *map(chr, range(33, 127))]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def record(number: int, image: str | None = None, **changes: Any) -> dict[str, Any]:
    """A good LLaVA record; `changes` replace keys, and None removes one."""
    question = "What is this?" if image is None else "<image>\nWhat is this?"
    made: dict[str, Any] = {"id": f"r{number}"}
    if image is not None:
        made["image"] = image
    made["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": f"Thing {number}, " + "very " * (number % 5) + "nice."},
    ]
    return {key: value for key, value in (made | changes).items() if value is not None}


def write_data(root: Path, records: list[Any], images: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    """`records` and images 0.png ... below root/data/toy."""
    folder = root / "data" / "toy" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(images):
        pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder.parent / "records.json").write_text(json.dumps(records))


def toy_data(num_samples: int | None = None) -> TrainingData:
    return TrainingData(
        label="Toy",
        folder="toy",
        records="records.json",
        images="images",
        num_samples=num_samples,
        build=None,
    )


def paths_below(root: Path) -> Paths:
    names = ("data", "weights", "cache", "runs", "reports")
    return Paths(root=str(root), **{name: str(root / name) for name in names})
