"""How fast are token lengths measured? Samples per second of one core, on what benchmarks/stand_in.py writes.

    python benchmarks/stand_in.py OUT --scale 0.01
    python benchmarks/token_lengths.py OUT/llava_instruct/llava_v1_5_mix665k.json

The tokenizer is a byte-level BPE with Llama-3's control tokens, trained on the records' own text. With --save
it stands in for the published one: `python -m morebench.data check llm=llama31_8b` counts with it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import load_chat_format
from morebench.data.chat import ChatFormat
from morebench.data.index import build_index
from morebench.data.records import Parsed, Sample, iter_records

CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL += ["<|eom_id|>", "<|finetune_right_pad_id|>"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--num-visual-tokens", type=int, default=576)
    parser.add_argument("--save", type=Path, help="folder for the tokenizer, e.g. weights/<hub id>")
    chosen = parser.parse_args()
    with chosen.records.open("rb") as file:
        parsed = [one for one in iter_records(file, chosen.records) if isinstance(one, Parsed)]
    samples = [one.sample for one in parsed]
    tokenizer = trained_tokenizer(samples)
    if chosen.save is not None:
        tokenizer.save_pretrained(chosen.save)
    chat = ChatFormat.from_dict(load_chat_format("llama_3_1"))
    with tempfile.TemporaryDirectory() as cache:
        started = time.process_time()
        arguments = (chosen.num_visual_tokens, 4096, Path(cache), "benchmark")
        index = build_index(samples, chat, tokenizer, *arguments)
        seconds = time.process_time() - started
    text = index.lengths.sum() - chosen.num_visual_tokens * index.num_images.sum()
    print(f"{len(samples)} samples, {text / len(samples):.0f} tokens of text each, {index.truncated} cut")
    print(f"{seconds:.1f} s: {len(samples) / seconds:,.0f} samples/s, {text / seconds:,.0f} tokens of text/s")


def trained_tokenizer(samples: list[Sample]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_texts(samples[:2_000]), trainer)
    roles = {"bos_token": CONTROL[0], "eos_token": "<|eot_id|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def _texts(samples: list[Sample]) -> Iterator[str]:
    for sample in samples:
        for turn in sample.turns:
            yield from (turn.question, turn.answer)


if __name__ == "__main__":
    main()
