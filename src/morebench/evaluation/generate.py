"""Greedy generation in batches whose answers do not depend on the batch.

A question is padded on its left only: transformers' sliding windows count positions of the cache, not of the
text, so a pad between an image and its question would push the image out of sight.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from morebench.data.chat import Encoded
from morebench.errors import NonFiniteError
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import LoadedModel
from morebench.models.mllm import MLLM

# Two best logits closer than this may change places with the batch, by rounding alone.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Request:
    """`images`: one per image of the prompt, in order."""

    prompt: Encoded
    images: tuple[StoredImage, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int  # without the token that ended it
    unreadable_tokens: int  # ids beyond the tokenizer's: rows that only round the LLM's vocabulary up
    near_ties: int  # steps at which the two best tokens were nearly equal
    ended: bool  # False: cut at the length limit


@contextmanager
def generation_attention(llm: PreTrainedModel) -> Iterator[None]:
    """transformers' own attention while generating with a cache; ours has none."""
    training_attention = llm.config._attn_implementation
    # sdpa has no soft-cap: transformers would leave it out.
    has_softcap = getattr(llm.config, "attn_logit_softcapping", None) is not None
    llm.set_attn_implementation("eager" if has_softcap else "sdpa")
    try:
        yield
    finally:
        llm.set_attn_implementation(training_attention)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in `lengths`, like lengths together, the longest first: out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def plan_chunks(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Positions in `requests` of what is answered together: a function of the requests alone, so that the
    same ones ride together on any number of devices and after any resume.
    """
    return length_batches([len(request.prompt.input_ids) for request in requests], batch_size)


class Generator:
    """Call inside `generation_attention`."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One chunk's answers, in order. Raises NonFiniteError, and SampleError for an image."""
        model = self._model
        return generate(
            model.mllm,
            model.tokenizer,
            model.end_token_ids(),
            [request.prompt for request in requests],
            [model.encode(request.images) for request in requests],
            max(request.max_new_tokens for request in requests),
        )

    def stream(self, request: Request) -> Iterator[str]:
        """The answer's text in pieces, as they come."""
        yield self.answer([request])[0].text


@torch.inference_mode()
def generate(
    mllm: MLLM,
    tokenizer: PreTrainedTokenizerFast,
    end_token_ids: Collection[int],
    prompts: Sequence[Encoded],
    visual_IVD: Sequence[Tensor],
    max_new_tokens: int,
) -> list[Answer]:
    """`visual_IVD`: of every prompt, its images as `MLLM.encode_images` gives them.

    Call inside `generation_attention`. Raises NonFiniteError if the LLM's logits are not numbers.
    """
    inputs, mask_BT = _left_padded(mllm, prompts, visual_IVD)
    generated: list[list[int]] = [[] for _ in prompts]
    near_ties, ended = [0] * len(prompts), [False] * len(prompts)
    rows = list(range(len(prompts)))  # which prompt a row of the tensors belongs to
    cache = DynamicCache(config=mllm.llm.config)
    for _ in range(max_new_tokens):
        logits_BZ = _last_logits(mllm.llm, inputs, mask_BT, cache)
        best_values, best_ids = (pair.tolist() for pair in logits_BZ.topk(2))
        for row, (first, second), (token, _) in zip(rows, best_values, best_ids, strict=True):
            if not ended[row]:
                near_ties[row] += first - second < NEAR_TIE
                ended[row] = token in end_token_ids
                generated[row] += [] if ended[row] else [token]
        open_rows = [i for i, row in enumerate(rows) if not ended[row]]
        if not open_rows:
            break
        tokens_B1 = torch.tensor([[ids[0]] for ids in best_ids], device=mask_BT.device)
        if 2 * len(open_rows) <= len(rows):  # copying the cache pays from about here
            chosen = torch.tensor(open_rows, device=mask_BT.device)
            cache.batch_select_indices(chosen)
            mask_BT, tokens_B1 = mask_BT[chosen], tokens_B1[chosen]
            rows = [rows[i] for i in open_rows]
        inputs = {"input_ids": tokens_B1}
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    size = len(tokenizer)
    unreadable = [sum(token >= size for token in tokens) for tokens in generated]  # decoding drops them
    return [
        Answer(*row) for row in zip(texts, map(len, generated), unreadable, near_ties, ended, strict=True)
    ]


def _left_padded(
    mllm: MLLM, prompts: Sequence[Encoded], visual_IVD: Sequence[Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """-> inputs of the first step, attention mask `[B, T]`."""
    device = mllm.llm.device
    lengths = [len(prompt.input_ids) for prompt in prompts]
    ids_T = torch.cat([torch.from_numpy(prompt.input_ids) for prompt in prompts]).long().to(device)
    visual_T = torch.cat([torch.from_numpy(prompt.visual_mask) for prompt in prompts]).to(device)
    embeds_TD = mllm.embed(ids_T, visual_T.nonzero()[:, 0], torch.cat([*visual_IVD]).to(device))
    longest = max(lengths)
    embeds_BTD = embeds_TD.new_zeros(len(prompts), longest, embeds_TD.shape[1])
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, piece in enumerate(embeds_TD.split(lengths)):
        embeds_BTD[row, longest - len(piece) :] = piece
        mask_BT[row, longest - len(piece) :] = 1
    return {"inputs_embeds": embeds_BTD}, mask_BT


def _last_logits(
    llm: PreTrainedModel, inputs: dict[str, Tensor], mask_BT: Tensor, cache: DynamicCache
) -> Tensor:
    new = next(iter(inputs.values())).shape[1]
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -new:]
    output = llm(
        **inputs,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BZ: Tensor = output.logits[:, -1].float()
    if not logits_BZ.isfinite().all():
        raise NonFiniteError("The LLM's logits are NaN or infinite: its weights are, or bf16 overflowed.")
    return logits_BZ
