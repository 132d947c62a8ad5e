# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""Tiny tokenizers with the families' real control tokens, and data sets on disk."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.config.schema import Paths, TrainingData
from morebench.data.chat import ChatFormat

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA_TOKENS += ["<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"]
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
DEEPSEEK_ROLES = ["<｜User｜>", "<｜Assistant｜>"]  # the published tokenizer does not call these special

FORMATS = ("gemma_2", "phi_4", "llama_3_1", "llama_3", "deepseek_r1", "v1", "phi_2", "chatml")

# The pre-tokenization of the newer byte-level families, which keeps runs of newlines together.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPLIT += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SWALLOWS = {"": {}, "right": {"rstrip": True}, "both": {"rstrip": True, "lstrip": True}}


def chat_format(stem: str) -> ChatFormat:
    return ChatFormat.from_dict(load_chat_format(stem))


@cache
def tokenizer_for(
    stem: str, swallows: str = "", merges: bool = False, prefix: str = "prepend"
) -> PreTrainedTokenizerFast:
    """One id per byte (per character for Vicuna), so that ids can be worked out by hand.

    `swallows`: on which sides control tokens take white space in. `merges`: some pairs become one id.
    `prefix` (Vicuna): who puts a space in front of texts, the normalizer ("prepend", the first Llama
    tokenizers), or the pre-tokenizer, to all ("always") or where a text begins ("first").
    """

    def byte_level(names: list[str], not_special: list[str] | None = None, **roles: str) -> Any:
        tokens = [AddedToken(name, normalized=False, **_SWALLOWS[swallows]) for name in names]
        marks = [
            AddedToken(name, special=False, normalized=False, **_SWALLOWS[swallows])
            for name in not_special or []
        ]
        return _byte_level(tokens, marks, merges, **roles)

    if stem == "gemma_2":
        names = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
        return byte_level(names, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    if stem == "phi_4":
        names = ["<|endoftext|>", "<|system|>", "<|assistant|>", "<|end|>", "<|user|>"]
        return byte_level(names, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if stem in ("llama_3_1", "llama_3"):
        return byte_level(LLAMA_TOKENS, bos_token=LLAMA_TOKENS[0], eos_token="<|eot_id|>")
    if stem == "deepseek_r1":
        first, last = DEEPSEEK_TOKENS
        return byte_level(DEEPSEEK_TOKENS, DEEPSEEK_ROLES, bos_token=first, eos_token=last)
    if stem == "phi_2":
        return byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if stem == "chatml":
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return byte_level(names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return _metaspace(_SWALLOWS[swallows], merges, prefix)


def _byte_level(
    special: list[AddedToken], not_special: list[AddedToken], merges: bool, **roles: str
) -> PreTrainedTokenizerFast:
    pairs = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("Ġ", "U"), ("o", "n"), ("ĊĊ", "Ċ")] if merges else []
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(not_special)
    names = [token.content for token in special]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special, **roles)
    assert fast.convert_tokens_to_ids(names) == list(range(len(alphabet), len(alphabet) + len(names)))
    return fast


def _metaspace(swallows: dict[str, bool], merges: bool, prefix: str) -> PreTrainedTokenizerFast:
    """Vicuna's: bytes stand in for unknown characters."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pairs = [("▁", "▁"), ("▁", "a"), ("▁", "U"), ("o", "n"), ("▁", "A"), ("▁A", "S")] if merges else []
    letters = ["▁", *map(chr, range(33, 127)), *map("".join, pairs)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True))
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, **swallows) for name in ("<unk>", "<s>", "</s>")])
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
        allowed_links=[],
        also_quarantine=[],
        num_samples=num_samples,
        assumed_lengths=[],
        build=None,
    )


def paths_below(root: Path) -> Paths:
    names = ("data", "weights", "cache", "runs", "reports", "checks")
    return Paths(root=str(root), **{name: str(root / name) for name in names})
