"""Where DeepSpeed's ZeRO-2 and ZeRO-3 keep fp32 parameters, gradients and Adam's moments.

Both flatten the trained parameters and give every rank one piece, for which its optimizer has an fp32 tensor:
under ZeRO-2 all parameters as one, cut into equal parts; under ZeRO-3 each parameter by itself.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor, nn

from morebench.config.schema import Part, Precision
from morebench.data.batch import Batch
from morebench.models.mllm import MLLM
from morebench.models.parts import module
from morebench.models.stored import Pieces
from morebench.training.fragments import Fragment, whole
from morebench.training.resume import check_shapes, misfit
from morebench.training.sharding import Parameters
from morebench.training.zero_strategy import ZeroStrategy, encoder_hidden


class _Piece(NamedTuple):
    """Of a parameter, on this rank."""

    start: int  # in the flattened parameter
    size: int  # 0 for a rank that has nothing of it
    flat: Tensor  # the fp32 tensor of the optimizer that it lies in, beside other parameters' pieces
    offset: int  # in `flat`

    def of(self, tensor: Tensor) -> Tensor:
        """The same piece of something laid out like `flat`."""
        return tensor.detach().narrow(0, self.offset, self.size)

    def read(self, pieces: Pieces, name: str) -> Tensor:
        return pieces.read(name, self.start, self.start + self.size)


class Zero:
    def __init__(self, trainer: Trainer, strategy: ZeroStrategy) -> None:
        self._trainer = trainer
        self._strategy = strategy

    @property
    def waits_inside(self) -> bool:
        return True

    @property
    def loss_factor(self) -> float:
        # Lightning and DeepSpeed both divide by the number of micro-batches, the reduction by that of ranks
        return float(self._trainer.accumulate_grad_batches**2 * self._trainer.world_size)

    def place(self, mllm: MLLM, precision: Precision) -> None:
        bf16, unread = precision is Precision.bf16, mllm.unread
        trained = {name: value for name, value in mllm.named_parameters() if value.requires_grad}
        # DeepSpeed makes the optimizer's fp32 copies of parameters that it has rounded: these replace them
        exact = {name: value.data for name, value in trained.items() if bf16 and not value.is_meta}
        if unread is not None:
            _place_sharded(mllm, unread, self._strategy, torch.bfloat16 if bf16 else torch.float32)
            mllm.unread = None
        if bf16:
            self._strategy.when_set_up = lambda: self._unround(mllm, exact, unread)

    def grad_norm(self, trained: Parameters) -> Tensor:
        found = [gradient for value in trained.values() if (gradient := self._gradient(value)) is not None]
        squared = torch.zeros((), device=self._strategy.root_device)
        if found:
            squared += nn.utils.get_total_norm(found).float() ** 2
        torch.distributed.all_reduce(squared)
        return squared.sqrt()

    def clip(self, trained: Parameters, max_norm: float, grad_norm: Tensor) -> None:
        # as torch's clip_grads_with_norm_
        factor = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for value in trained.values():
            if (gradient := self._gradient(value)) is not None:
                gradient.mul_(factor)

    def leave_out(self, optimizer: torch.optim.Optimizer, trained: Parameters) -> None:
        self.discard_gradients()
        self._strategy.leaves_out = True

    def parameters(self, trained: Parameters) -> dict[str, Fragment]:
        return {
            name: Fragment(piece.of(piece.flat), piece.start, _shape(value))
            for name, value in trained.items()
            if (piece := self._piece(value)).size
        }

    def optimizer_state(self, optimizer: torch.optim.Optimizer, trained: Parameters) -> dict[str, Fragment]:
        found = {}
        for name, value in trained.items():
            piece = self._piece(value)
            for key, state in self._adam.state[piece.flat].items():
                if state.shape != piece.flat.shape:  # the number of steps, which all ranks have
                    if self._trainer.is_global_zero:
                        found[f"{name}/{key}"] = whole(state)
                elif piece.size:
                    found[f"{name}/{key}"] = Fragment(piece.of(state), piece.start, _shape(value))
        return found

    def restore(
        self, optimizer: torch.optim.Optimizer, trained: Parameters, parameters: Pieces, state: Pieces
    ) -> None:
        check_shapes(
            {name: torch.empty(_shape(value), device="meta") for name, value in trained.items()},
            parameters.shapes,
        )
        keys = {name: [key for key in state.shapes if key.rpartition("/")[0] == name] for name in trained}
        if missing := [name for name, found in keys.items() if not found]:
            raise misfit(f"no optimizer state for {missing}")
        for name, value in trained.items():
            piece = self._piece(value)
            piece.of(piece.flat).copy_(piece.read(parameters, name))
            for key in keys[name]:
                kept, short = self._adam.state[piece.flat], key.removeprefix(f"{name}/")
                if state.shapes[key] == ():
                    kept[short] = state.read(key, 0, 1).view(()).to(piece.flat.device)
                    continue
                if short not in kept:
                    kept[short] = torch.zeros_like(piece.flat, requires_grad=False)
                piece.of(kept[short]).copy_(piece.read(state, key))
        self._publish()

    def gather(self, trained: Parameters) -> Iterator[tuple[str, Tensor]]:
        for name, value in trained.items():
            piece = self._piece(value)
            full = piece.flat.new_zeros(math.prod(_shape(value)))
            full[piece.start : piece.start + piece.size] = piece.of(piece.flat)
            torch.distributed.all_reduce(full)  # of one number and zeros
            yield name, full.view(_shape(value)).cpu()

    def rehearse(self, batch: Batch) -> None:
        """A micro-batch forward and backward, beside what AdamW's first step adds; it leaves no gradient."""
        flats = [flat for group in self._flats() for flat in 2 * [group] if flat not in self._adam.state]
        held = [torch.empty_like(flat) for flat in flats]
        engine: Any = self._strategy.model
        engine.backward(engine(batch), scale_wrt_gas=False)
        del held
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """As if no micro-batch of this optimizer step had run yet."""
        optimizer = self._optimizer
        optimizer.zero_grad()
        if self._strategy.stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
            optimizer.averaged_gradients = {}
        else:
            for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                kept.update(dict.fromkeys(kept))  # the pieces of the parameters refer to the first
            optimizer.micro_step_id = -1

    @property
    def _optimizer(self) -> Any:
        """DeepSpeed's."""
        return self._strategy.optimizers[0]

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer of this rank works on."""
        if self._strategy.stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups

    def _piece(self, value: nn.Parameter) -> _Piece:
        optimizer, parameter = self._optimizer, _untyped(value)
        if self._strategy.stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(value)]
            start = min(size * self._trainer.global_rank, parameter.ds_numel)
            count = min(size, parameter.ds_numel - start)  # the last piece may be filled up with zeros
            return _Piece(start, count, self._flats()[group], offset)
        (flat,) = self._flats()
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Piece(0, 0, flat, 0)
        address = mapping.lp_fragment_address
        return _Piece(address.start, address.numel, flat, mapping.hp_fragment_address.start)

    def _gradient(self, value: nn.Parameter) -> Tensor | None:
        """The memory of this rank's piece itself, after the last micro-batch of a step."""
        piece, parameter = self._piece(value), _untyped(value)
        if not piece.size:
            return None
        if self._strategy.stage == 3:
            local, _ = self._optimizer._get_fp32_grad_state_partition(value, release_swap_buffers=False)
            return local.narrow(0, 0, piece.size)
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _publish(self) -> None:
        """The parameters that compute become the optimizer's."""
        optimizer = self._optimizer
        if self._strategy.stage == 2:
            optimizer.update_lp_params()
            return
        assert self._strategy.lightning_module is not None
        with encoder_hidden(self._strategy.lightning_module):
            optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)

    def _unround(self, mllm: MLLM, exact: dict[str, Tensor], unread: Pieces | None) -> None:
        for name, value in mllm.named_parameters():
            if not value.requires_grad:
                continue
            piece = self._piece(value)
            target = piece.of(piece.flat)
            if name in exact:
                target.copy_(exact[name].flatten()[piece.start : piece.start + piece.size])
            else:
                assert unread is not None
                target.copy_(piece.read(unread, name.removeprefix(f"{Part.llm.name}.")))


def _place_sharded(mllm: MLLM, unread: Pieces, strategy: ZeroStrategy, dtype: torch.dtype) -> None:
    """One parameter after the other: read, cut, thrown away but for this rank's piece."""
    from deepspeed import zero

    projector, llm = module(mllm, Part.projector), module(mllm, Part.llm)
    zero.Init(module=projector.to(dtype), config_dict_or_path=strategy.config)
    convert = _untyped(next(projector.parameters())).convert_to_zero_parameters
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one once
    for prefix, one in llm.named_modules():
        for name, value in list(one.named_parameters(recurse=False)):
            if value not in made:
                full = unread.read(f"{prefix}.{name}".removeprefix("."), 0, value.numel()).view(value.shape)
                made[value] = nn.Parameter(full.to(strategy.root_device, dtype), value.requires_grad)
                convert(param_list=[made[value]])
            one.register_parameter(name, made[value])
    for one in (projector, llm):  # DeepSpeed moves only what it has not cut
        for buffered in one.modules():
            for name, buffer in buffered.named_buffers(recurse=False):
                buffered._buffers[name] = buffer.to(strategy.root_device)
    # whole through the root's forward and backward: the loss takes the head in chunks
    ends = (mllm.llm.get_input_embeddings(), mllm.llm.get_output_embeddings())
    for value in {value for end in ends for value in end.parameters(recurse=False)}:
        zero.register_external_parameter(mllm, value)


def _shape(value: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(value, "ds_shape", value.shape))


def _untyped(value: nn.Parameter) -> Any:
    """With what DeepSpeed hangs on it."""
    return value
