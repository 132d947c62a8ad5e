"""FSDP2: every rank holds a slice of the rows of each parameter of the LLM and the projector.

A block of the LLM is gathered while it computes. The embedding, the head (tied or not), the final norm and
the projector form the root group, which stays gathered through forward and backward: the loss computes
logits chunk by chunk inside the root module's forward. The vision encoder is frozen and small: each rank has it.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from morebench.config.schema import Part, Precision
from morebench.errors import ConfigError
from morebench.models.mllm import MLLM
from morebench.models.parts import module
from morebench.models.stored import Pieces
from morebench.training.fragments import Fragment, whole
from morebench.training.resume import check_shapes, misfit
from morebench.training.sharding import Parameters

# Gathered in bf16, gradients summed over ranks in fp32; the slices that the optimizer holds are fp32.
_POLICIES = {
    Precision.fp32: MixedPrecisionPolicy(cast_forward_inputs=False),
    Precision.bf16: MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}


class FullySharded:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def waits_inside(self) -> bool:
        return True

    def place(self, mllm: MLLM, precision: Precision) -> None:
        if isinstance(mllm, FSDPModule):  # Lightning may ask twice
            return
        strategy = self._trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy)
        shard = partial(
            fully_shard, mesh=strategy.device_mesh["data_parallel"], mp_policy=_POLICIES[precision]
        )
        blocks = [one for one in mllm.llm.modules() if isinstance(one, GradientCheckpointingLayer)]
        if not blocks:
            raise ConfigError(
                f"trainer.strategy=fsdp2: no blocks are found in {type(mllm.llm).__name__}, so it would be "
                "gathered as a whole. Use trainer.strategy=ddp."
            )
        for block in blocks:
            shard(block)
        shard(mllm, ignored_params=set(module(mllm, Part.vision).parameters()))
        if mllm.unread is not None:
            _materialise(mllm.llm, strategy.root_device)
            _fill(mllm.llm, mllm.unread)
            mllm.unread = None

    @property
    def loss_factor(self) -> float:
        # Lightning divides by the number of micro-batches, the reduction by the number of ranks
        return float(self._trainer.accumulate_grad_batches * self._trainer.world_size)

    def grad_norm(self, trained: Parameters) -> Tensor:
        pieces = [_local(value.grad) for value in trained.values() if value.grad is not None]
        squared = nn.utils.get_total_norm(pieces).float() ** 2
        torch.distributed.all_reduce(squared)
        return squared.sqrt()

    def clip(self, trained: Parameters, max_norm: float, grad_norm: Tensor) -> None:
        # as torch's clip_grads_with_norm_, which takes no norm of its own for sharded gradients
        factor = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for value in trained.values():
            if value.grad is not None:
                _local(value.grad).mul_(factor)

    def parameters(self, trained: Parameters) -> dict[str, Fragment]:
        return {name: piece for name, value in trained.items() if (piece := _piece(value)) is not None}

    def optimizer_state(self, optimizer: torch.optim.Optimizer, trained: Parameters) -> dict[str, Fragment]:
        found = {}
        for name, parameter in trained.items():
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, DTensor):
                    piece = _piece(value)
                else:  # the number of steps, which all ranks have
                    piece = whole(value) if self._trainer.is_global_zero else None
                if piece is not None:
                    found[f"{name}/{key}"] = piece
        return found

    def restore(
        self, optimizer: torch.optim.Optimizer, trained: Parameters, parameters: Pieces, state: Pieces
    ) -> None:
        check_shapes(trained, parameters.shapes)
        for name, value in trained.items():
            _read(value, parameters, name)
        keys = {name: [key for key in state.shapes if key.rpartition("/")[0] == name] for name in trained}
        if missing := [name for name, found in keys.items() if not found]:
            raise misfit(f"no optimizer state for {missing}")
        for name, value in trained.items():
            for key in keys[name]:
                scalar = state.shapes[key] == ()
                restored = value.new_zeros(()) if scalar else torch.zeros_like(value)
                optimizer.state[value][key.removeprefix(f"{name}/")] = restored
                _read(restored, state, key)

    def gather(self, trained: Parameters) -> Iterator[tuple[str, Tensor]]:
        for name, value in trained.items():
            assert isinstance(value, DTensor)
            full: Tensor = value.full_tensor()
            yield name, full.detach().float().cpu()


def _materialise(llm: nn.Module, device: torch.device) -> None:
    """Room for this rank's pieces; tied weights stay one parameter."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for one in llm.modules():
        for name, value in one.named_parameters(recurse=False):
            if value.is_meta:
                if value not in made:
                    made[value] = nn.Parameter(torch.empty_like(value, device=device), value.requires_grad)
                one.register_parameter(name, made[value])


def _fill(llm: nn.Module, stored: Pieces) -> None:
    for name, value in llm.named_parameters():
        _read(value, stored, name)


@torch.no_grad()
def _read(target: Tensor, stored: Pieces, name: str) -> None:
    local = _local(target)
    start = _start(target) if isinstance(target, DTensor) else 0
    local.copy_(stored.read(name, start, start + local.numel()).view(local.shape))


def _piece(value: Tensor) -> Fragment | None:
    """None for a rank that has no row of it."""
    assert isinstance(value, DTensor)
    local = _local(value)
    return Fragment(local.flatten(), _start(value), tuple(value.shape)) if local.numel() else None


def _local(value: Tensor) -> Tensor:
    """The memory of this rank's piece itself."""
    local: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return local.detach()


def _start(value: DTensor) -> int:
    """Of this rank's piece in the flattened whole: rows are dealt as `torch.chunk` does."""
    mesh = value.device_mesh
    rows = -(-value.shape[0] // mesh.size())
    return min(rows * mesh.get_local_rank(), value.shape[0]) * math.prod(value.shape[1:])
