import pytest
import torch

from morebench.models.attention import varlen_attention

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
