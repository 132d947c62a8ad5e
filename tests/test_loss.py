"""The loss kernels: the same sum and the same gradients."""

import sys
from types import ModuleType

import pytest
import torch
from factories_models import gradients, packed, tiny_mllm
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from morebench.config.schema import LossKernel
from morebench.models.loss import liger_loss_sum

NO_GPU = not torch.cuda.is_available()


class FakeLiger:
    """What liger documents, in torch."""

    def __init__(self, reduction: str, softcap: float | None, accum_dtype: torch.dtype) -> None:
        assert (reduction, accum_dtype) == ("sum", torch.float32)
        self._softcap = softcap

    def __call__(self, weight: Tensor, hidden: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        logits = linear(hidden, weight, bias)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "llama", "phi"])  # soft-cap and tied; plain; a head with a bias
def test_liger_is_asked_for_the_same(family: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = FakeLiger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = []
    for kernel in (LossKernel.torch, LossKernel.liger):
        mllm = tiny_mllm(family)
        mllm.llm.requires_grad_(trained)
        mllm.loss_kernel = kernel
        loss = mllm(packed((9, 12), (True, False)))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(mllm)})
        without_targets = mllm(packed((9,), (True,))._replace(targets=torch.zeros(0, dtype=torch.int64)))
        assert without_targets == 0
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(NO_GPU, reason="needs a GPU: liger's kernels are Triton's")
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("trained", [True, False])
def test_liger_equals_torch_on_a_gpu(trained: bool, softcap: float | None) -> None:
    pytest.importorskip("liger_kernel", reason="needs the extra liger")
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 5000, bias=False, device="cuda").requires_grad_(trained)
    hidden = torch.randn(300, 256, device="cuda").requires_grad_()
    targets = torch.randint(5000, (300,), device="cuda")
    results = []
    for liger in (False, True):
        head.zero_grad()
        hidden.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            if liger:
                loss = liger_loss_sum(hidden, targets, head, softcap)
            else:
                logits = head(hidden).float()
                bent = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                loss = cross_entropy(bent, targets, reduction="sum")
        (loss / 300).backward()
        results.append((loss.detach(), hidden.grad.clone(), head.weight.grad))  # type: ignore[union-attr]
    (one, one_hidden, one_head), (other, other_hidden, other_head) = results
    torch.testing.assert_close(other, one, rtol=2e-3, atol=0)
    torch.testing.assert_close(other_hidden, one_hidden, rtol=5e-2, atol=1e-4)
    assert (other_head is None) == (not trained)
    if trained:
        torch.testing.assert_close(other_head, one_head, rtol=5e-2, atol=1e-4)
