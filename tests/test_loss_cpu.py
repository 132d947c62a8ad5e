"""The loss in pieces against cross_entropy and autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from morebench.models import loss_cpu


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 7])
def test_equals_autograd(
    softcap: float | None, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias)
    hidden = (4 * torch.randn(rows, 6)).requires_grad_()
    targets = torch.randint(0, 11, (rows,))
    monkeypatch.setattr(loss_cpu, "_LOGITS_PER_PIECE", 3 * 11)  # pieces of 3, 3 and 1
    logits = head(hidden)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    expected = cross_entropy(logits, targets, reduction="sum")
    found = loss_cpu.one_pass_loss_sum(hidden, head, softcap, targets)
    torch.testing.assert_close(found, expected)
    inputs = [hidden, *head.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(0.3 * found, inputs), torch.autograd.grad(0.3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
