from itertools import pairwise
from typing import Any

import pytest
import torch
from factories_models import gradients, packed, tiny_mllm
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from morebench.config.schema import Attention
from morebench.models import attention_gpu
from morebench.models.attention import Loop, varlen_attention
from morebench.models.attention_gpu import Flex, Varlen, attend_with, attention_problem, block_mask

LENGTHS = (6, 1, 9)
BORDERS = [0, 6, 7, 16]


def reference(query, key, value, scale, softcap, window):
    """One T x T matrix with everything forbidden that crosses a border, the future or the window."""
    heads_per_group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_group, dim=1) for tensor in (key, value))
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(sum(LENGTHS))
    distance = position[:, None] - position[None, :]
    visible = (sample[:, None] == sample[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4, 100])
def test_equals_one_masked_matrix(softcap, window):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 16, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(2))
    inputs = (query, key, value)
    ours, _ = varlen_attention(
        torch.nn.Module(),
        *inputs,
        None,
        cu_seqlens=BORDERS,
        scaling=0.5,
        softcap=softcap,
        sliding_window=window,
    )
    expected = reference(*inputs, 0.5, softcap, window)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_refuses_to_run_without_borders():
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        varlen_attention(torch.nn.Module(), *torch.randn(3, 1, 2, 4, 8), None)


LONG = [0, 6, 7, 300, 301, 429, 640, 700]  # of blocks of 128: shorter, longer, at the edge
CPU = torch.device("cpu")


def inputs(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, length, 32) for heads in (4, 2, 2)]
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (1.5, 130), (None, 4), (1.5, 1000)])
def test_flex_equals_the_loop(softcap: float | None, window: int | None) -> None:
    tensors = [tensor.detach() for tensor in inputs(700)]  # it has no backward on the CPU
    ours = Flex(LONG, CPU)(*tensors, 0.5, softcap, window)
    torch.testing.assert_close(ours, Loop(LONG)(*tensors, 0.5, softcap, window))


@pytest.mark.parametrize("window", [None, 4, 130, 300])
def test_blocks_of_flex_are_those_with_something_to_see(window: int | None) -> None:
    sample_T = torch.repeat_interleave(torch.arange(len(LONG) - 1), torch.tensor(LONG).diff())
    mine = block_mask(sample_T, window, CPU)
    asked = create_block_mask(mine.mask_mod, None, None, 700, 700, device="cpu")  # asks each of 700 x 700
    assert torch.equal(mine.to_dense(), asked.to_dense())
    assert torch.equal(mine.kv_num_blocks, asked.kv_num_blocks)
    assert torch.equal(mine.full_kv_num_blocks, asked.full_kv_num_blocks)


def test_a_mask_is_made_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []

    def counting(sample_T: Tensor, window: int | None, device: torch.device) -> Any:
        made.append(window)
        return "mask"

    monkeypatch.setattr(attention_gpu, "block_mask", counting)
    monkeypatch.setattr(attention_gpu, "_flex", lambda device: lambda query, *_, **__: query)
    flex = Flex(LONG, CPU)
    for _ in range(3):
        for window in (None, 130, 4096):  # longer than every sample: no window
            flex(*inputs(700), 0.5, None, window)
    assert made == [None, 130]


def fake_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents: (left, 0) sees `left` positions before its own, all if it is -1."""
    assert query.dtype == key.dtype == value.dtype
    assert max_q == max_k == int(cu_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    outputs = []
    for start, end in pairwise(cu_q.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for tensor in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        weights = (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4, 130, 1000])
def test_varlen_is_asked_for_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "_varlen", lambda: fake_varlen)
    ours = Varlen(LONG, CPU)(*inputs(700), 0.5, None, window)
    torch.testing.assert_close(ours, Loop(LONG)(*inputs(700), 0.5, None, window))
    with pytest.raises(ValueError, match="knows no soft-cap"):
        Varlen(LONG, CPU)(*inputs(700), 0.5, 1.5, window)


def test_an_mllm_trains_alike_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "_varlen", lambda: fake_varlen)
    batch, found = packed((150, 40), (True, False)), {}
    for kind in (Attention.loop, Attention.varlen):
        mllm = tiny_mllm("phi3_windowed")
        mllm.attention = kind
        with torch.autocast("cpu", torch.bfloat16):  # rotary tables leave fp32 behind
            mllm(packed((4,), (False,)))
        mllm(batch).backward()
        found[kind] = gradients(mllm)
    for name, expected in found[Attention.loop].items():
        torch.testing.assert_close(found[Attention.varlen][name], expected, rtol=1e-3, atol=1e-4)


def test_a_small_pack_compiles_nothing() -> None:
    assert isinstance(attend_with(Attention.flex, [0, 1], CPU), Loop)
    assert isinstance(attend_with(Attention.flex, [0, 100, 129], CPU), Flex)


def test_reasons_against_a_kernel() -> None:
    flex, varlen, low = Attention.flex, Attention.varlen, torch.bfloat16
    assert attention_problem(Attention.loop, "cpu", torch.float32, 2.0, 8) is None
    assert "needs a GPU, and this run is on cpu" in str(attention_problem(flex, "cpu", low, None, 64))
    assert attention_problem(flex, "cuda", low, 50.0, 256) is None
    assert attention_problem(varlen, "cuda", low, None, 128) is None
    assert "soft-cap, and this LLM's attention has one of 50.0" in str(
        attention_problem(varlen, "cuda", low, 50.0, 256)
    )
    assert "precision is float32" in str(attention_problem(varlen, "cuda", torch.float32, None, 128))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: neither kernel has a backward on CPU")
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])  # Phi-2, Phi-3, Llama and Phi-4, Gemma-2
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 130), (50.0, None), (50.0, 130)])
def test_kernels_agree_on_a_gpu(softcap: float | None, window: int | None, head_dim: int) -> None:
    device, low = torch.device("cuda"), torch.bfloat16
    kinds = [
        kind
        for kind in (Attention.loop, Attention.flex, Attention.varlen)
        if attention_problem(kind, "cuda", low, softcap, head_dim) is None
    ]
    for borders in (LONG, [0, 200, 1111], [0, 256]):
        torch.manual_seed(0)
        tensors = [
            torch.randn(1, heads, borders[-1], head_dim, device=device, dtype=low).requires_grad_()
            for heads in (8, 4, 4)
        ]
        results = []
        for kind in kinds:
            out = attend_with(kind, borders, device)(*tensors, head_dim**-0.5, softcap, window)
            upstream = torch.linspace(-1, 1, out.numel(), device=device, dtype=low).view(out.shape)
            results.append([out, *torch.autograd.grad(out, tensors, upstream)])
        for other in results[1:]:
            for mine, theirs in zip(other, results[0], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
