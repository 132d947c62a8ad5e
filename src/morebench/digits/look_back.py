"""A start for the first attention of a tiny LLM, which published ones have learnt: read the tokens before.

In-context lookup ("What digit is red?") is learnt only once tokens know their neighbours. From a plain random
start that takes longer than the minutes there are; from this one it takes about a hundred steps.
"""

from typing import Any

import torch
from torch import Tensor

SHARPNESS = 9.0  # largest attention logit before softmax
CONSTANT_SHARE = 0.5  # of the norm of an embedding that is the same in all of them
SLOWEST = 0.05  # rotations per token; slower rotary channels cannot tell neighbours apart
REST = 0.1  # what stays of the random start of these rows


@torch.no_grad()
def start_looking_back(model: Any) -> None:
    """Head h of the first block attends to the token h + 1 places back, whatever the tokens are.

    Channel 0 of every embedding becomes a constant that queries and keys read; a query is the key turned
    by the rotary angle of that distance, so that their product is largest there (RoPE, arXiv 2104.09864).
    """
    config = model.config
    embeddings = model.get_input_embeddings().weight
    width = embeddings.shape[1]
    embeddings[:, 0] = CONSTANT_SHARE * width**0.5 * embeddings[:, 1:].square().mean().sqrt()
    constant = CONSTANT_SHARE * width**0.5 / (1 + CONSTANT_SHARE**2) ** 0.5  # after the block's RMSNorm

    angles_K = model.base_model.rotary_emb.inv_freq
    read_K = (angles_K > SLOWEST).float()
    query_rows, key_rows = _rows(model)
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    scale = (SHARPNESS / read_K.sum() * head_dim**0.5) ** 0.5 / constant
    for rows, distances in (
        (query_rows, range(1, config.num_attention_heads + 1)),
        (key_rows, [0] * config.num_key_value_heads),
    ):
        rows *= REST
        for head, distance in zip(rows.split(head_dim), distances, strict=True):
            head[:, 0] = 0
            half = len(angles_K)
            head[:half, 0] = scale * read_K * torch.cos(angles_K * distance)
            head[half : 2 * half, 0] = -scale * read_K * torch.sin(angles_K * distance)


def _rows(model: Any) -> tuple[Tensor, Tensor]:
    """Views `[heads * head_dim, width]` of the first block's query and key weights."""
    attention = model.base_model.layers[0].self_attn
    if hasattr(attention, "q_proj"):
        return attention.q_proj.weight.data, attention.k_proj.weight.data
    config = model.config  # Phi-3 keeps query, key and value in one matrix
    head_dim = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim]
    query, key, _ = attention.qkv_proj.weight.data.split([*sizes, sizes[1]])
    return query, key
