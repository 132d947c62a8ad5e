"""Recomputed and compiled blocks: the same gradients, the memory promised, no compiling per batch."""

from collections.abc import Iterator

import pytest
import torch
from factories_models import LLM_SHAPES, gradients, packed, tiny_mllm
from test_memory import STAGES, WIDE, config_of, kept_bytes, wide
from torch import nn
from torch._dynamo.utils import counters

from morebench.config.schema import Precision
from morebench.models.blocks import blocks_of, recompute_blocks, spread
from morebench.models.memory import memory
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm


def backward(mllm: MLLM, *lengths: int) -> dict[str, torch.Tensor]:
    mllm.zero_grad()
    mllm(packed(lengths, [True] * len(lengths))).backward()
    return gradients(mllm)


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_recomputed_blocks_give_the_same_gradients(family: str) -> None:
    expected, mllm = backward(tiny_mllm(family), 9, 12), tiny_mllm(family)
    recompute_blocks(mllm.llm, 1)
    found = backward(mllm, 9, 12)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recomputed_blocks_are_spread_evenly() -> None:
    assert [list(spread(number, 8)) for number in (0, 1, 3, 4, 8)] == [
        [],
        [0],
        [0, 2, 5],
        [0, 2, 4, 6],
        list(range(8)),
    ]


@pytest.mark.parametrize("recomputed", [1, 3])
@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_recompute_saves_what_is_estimated(family: str, recomputed: int) -> None:
    trained = STAGES["finetune"]
    config = config_of(wide(family))
    mllm = build_mllm(config, {}, Precision.bf16, trained).train()
    recompute_blocks(mllm.llm, recomputed)
    supervised = len(packed((40,), (True,)).targets)
    estimates = [memory(config, 40, 1, supervised, trained, number).sample for number in (0, 3, recomputed)]
    # all of three recomputed: three inputs, and the one block that is whole again in the backward pass
    inputs = 4 * 40 * WIDE["hidden_size"]
    block = (estimates[0] - estimates[1] + 3 * inputs) / 2
    assert estimates[2] - block == pytest.approx(kept_bytes(mllm, 40), abs=0.03 * estimates[0])


@pytest.fixture
def more_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(LLM_SHAPES, "llama", LLM_SHAPES["llama"] | {"num_hidden_layers": 3})
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("more_blocks")
def test_compiled_blocks_are_compiled_for_the_first_two_batches_alone() -> None:
    """Attention stays outside, so borders, of which every batch has others, are nothing it depends on."""
    plain, mllm = tiny_mllm("llama"), tiny_mllm("llama")
    for block in blocks_of(mllm.llm):
        block.forward = torch.compile(block.forward, backend="eager")
    recompute_blocks(mllm.llm, 2)
    graphs = []
    for lengths in ((9, 12), (13, 8, 9), (30,), (6, 7, 11)):
        found, expected = backward(mllm, *lengths), backward(plain, *lengths)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * 3


def test_names_of_parameters_stay() -> None:
    mllm = tiny_mllm("llama")
    names = list(mllm.state_dict())
    recompute_blocks(mllm.llm, 2)
    assert list(mllm.state_dict()) == names
    assert isinstance(blocks_of(mllm.llm)[0], nn.Module)
