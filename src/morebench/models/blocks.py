"""The LLM's blocks: which are computed again in the backward pass, and which torch.compile has seen.

Both wrap `forward` of a block, not the block: names of parameters stay, and hooks of what shards it stay
outside. Compiled blocks may be recomputed, so `compile_blocks` comes first.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def blocks_of(llm: PreTrainedModel) -> list[nn.Module]:
    return list(llm.base_model.get_submodule("layers").children())


def compile_blocks(llm: PreTrainedModel) -> None:
    """One block is compiled and serves all. A second number of tokens compiles again, a third does not."""
    for block in blocks_of(llm):
        block.forward = torch.compile(block.forward)


def recompute_blocks(llm: PreTrainedModel, number: int) -> None:
    """Keep only the input of `number` blocks, spread evenly."""
    blocks = blocks_of(llm)
    for index in spread(number, len(blocks)):
        blocks[index].forward = partial(checkpoint, blocks[index].forward, use_reentrant=False)


def spread(number: int, total: int) -> Iterator[int]:
    """`number` indices below `total`, evenly."""
    return (total * place // number for place in range(number))
