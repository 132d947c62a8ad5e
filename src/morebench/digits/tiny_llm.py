"""Pre-trains a tiny LLM of a real class on text worlds, in its family's own chat layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from morebench.config.compose import load_chat_format, load_shape
from morebench.data.chat import ChatFormat, Encoded
from morebench.digits.fitting import fit, reproducible
from morebench.digits.folders import new_folder
from morebench.digits.look_back import start_looking_back
from morebench.digits.text_worlds import draw_chat, draw_page
from morebench.digits.tiny_tokenizer import find_family, train_tokenizer
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config

LR = 4e-3
CHAT_SHARE = 0.4  # samples in the chat layout; the others are plain pages
INITIALIZER_RANGE = 0.05  # the usual 0.02 is too small for so narrow a model: nothing happens for many steps
CONTEXT_WEIGHT = 0.1  # loss on the words of a told scene, which nothing predicts, and on the layout
NUM_TOKENIZER_TEXTS = 2000
MAX_LENGTH = 512


def build(folder: Path, family: str, shape: str, seed: int, steps: int = 600, batch_size: int = 32) -> None:
    """An existing `folder` is kept."""
    if folder.exists():
        return
    facts = load_shape(shape)
    member = find_family(family)
    raw_format = load_chat_format(member.chat_format)
    with reproducible(seed), new_folder(folder) as draft:
        texts = tokenizer_texts(raw_format, np.random.default_rng([seed, 0]))
        tokenizer = train_tokenizer(member, texts, facts["vocab_size"])
        config = llm_config(facts)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.initializer_range = INITIALIZER_RANGE
        model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
        start_looking_back(model)
        writer = Writer(ChatFormat.from_dict(raw_format), tokenizer)

        def loss_of_step(step: int) -> Tensor:
            rng = np.random.default_rng([seed, 1, step])
            return packed_loss(model, [writer.draw(rng) for _ in range(batch_size)])

        blocks = {id(p) for p in model.base_model.layers.parameters() if p.ndim == 2}
        matrices = [p for p in model.parameters() if id(p) in blocks]
        others = [p for p in model.parameters() if id(p) not in blocks]
        fit(matrices, others, loss_of_step, steps, LR, f"{shape}: learning to read")
        transformers_logging.disable_progress_bar()  # of one shard
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


@dataclass(frozen=True)
class Writer:
    chat: ChatFormat
    tokenizer: PreTrainedTokenizerFast

    def draw(self, rng: np.random.Generator) -> Encoded:
        if rng.random() < CHAT_SHARE:
            return self.chat.encode(draw_chat(rng), self.tokenizer, 0, MAX_LENGTH)
        texts, answers = zip(*draw_page(rng), strict=True)
        pieces = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        has_bos = self.tokenizer.bos_token_id != self.tokenizer.eos_token_id
        ids = [self.tokenizer.bos_token_id] * has_bos + [token for piece in pieces for token in piece]
        supervised = np.repeat([False, *answers], [int(has_bos), *map(len, pieces)])
        return Encoded(np.array(ids, np.int32), supervised, np.zeros(len(ids), np.bool_), False)


def packed_loss(model: PreTrainedModel, samples: list[Encoded]) -> Tensor:
    """Mean over answers, plus CONTEXT_WEIGHT times the mean over everything else."""
    ids_T = torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]).astype(np.int64))
    answers_T = torch.from_numpy(np.concatenate([sample.supervised for sample in samples]))
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.cumsum([0, *lengths])
    hidden_TD = model.base_model(
        input_ids=ids_T[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
        cu_seqlens=starts.tolist(),
    ).last_hidden_state[0]
    predicted_T = torch.ones(len(ids_T), dtype=torch.bool)
    predicted_T[starts[:-1]] = False
    at = predicted_T.nonzero()[:, 0]
    logits = model.get_output_embeddings()(hidden_TD[at - 1])
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    losses = cross_entropy(logits, ids_T[at], reduction="none")
    answered = answers_T[at]
    return losses[answered].mean() + CONTEXT_WEIGHT * losses[~answered].mean()


def tokenizer_texts(chat_format: dict[str, Any], rng: np.random.Generator) -> Iterator[str]:
    """Questions and answers, and the fixed texts of the chat layout."""
    fixed = [item["text"] for key in ("start", "turn") for item in chat_format.get(key, []) if "text" in item]
    for _ in range(NUM_TOKENIZER_TEXTS):
        yield from (text for turn in draw_chat(rng).turns for text in (turn.question, turn.answer))
        yield from (text for text, _ in draw_page(rng))
        yield from (text.replace("{question}", "").replace("{answer}", "") for text in fixed)
