"""Which kernel is the fastest: the stage's heaviest micro-batch through two blocks of its LLM, on the GPU."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from morebench.config.compose import load_shape
from morebench.config.schema import Attention, Config, LossKernel, Part, Precision, TrainRecipe
from morebench.data.batch import Batch
from morebench.models.attention import VARLEN
from morebench.models.blocks import compile_blocks
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.projector import MLPProjector

_BLOCKS = 2  # Gemma-2 has a sliding window in every second one
_REPEATS = 3

Choice = TypeVar("Choice")


class Probe:
    """Random weights and no images, but lengths, supervised tokens, widths and dtypes of the stage."""

    def __init__(
        self,
        config: Config,
        recipe: TrainRecipe,
        lengths: Sequence[int],
        supervised: Sequence[int],
        device: torch.device,
    ) -> None:
        """`lengths` and supervised tokens of the samples of one micro-batch."""
        self._device = device
        self._autocast = recipe.precision is Precision.bf16
        trained = Part.llm in recipe.trainable
        low = self._autocast and not trained
        shape = load_shape(config.llm.shape)
        shape = shape | {"num_hidden_layers": _BLOCKS}
        if "layer_types" in shape:
            shape["layer_types"] = shape["layer_types"][:_BLOCKS]
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            llm = AutoModelForCausalLM.from_config(
                llm_config(shape),
                dtype=torch.bfloat16 if low else torch.float32,
                attn_implementation=VARLEN,
            ).requires_grad_(trained)
            # its gradient has to come down through the LLM
            projector = MLPProjector(8, llm.config.hidden_size, depth=1)
            self._mllm = MLLM(cast(Any, nn.Identity()), cast(Any, nn.Identity()), projector, llm).train()
        self._batch = _text(lengths, supervised, device)
        # another length first, so that what is compiled is what later batches use
        self._other = _text(lengths[1:] or [max(1, lengths[0] // 2)], supervised[1:] or [1], device)

    def attend_by(self, kind: Attention) -> None:
        self._mllm.attention = kind

    def lose_by(self, kind: LossKernel) -> None:
        self._mllm.loss_kernel = kind

    def compile_or_not(self, compiled: bool) -> None:
        """Not back again."""
        if compiled:
            compile_blocks(self._mllm.llm)

    def fastest(self, name: str, open_choices: Iterable[Choice], use: Callable[[Choice], None]) -> Choice:
        """In the end it uses the fastest. One that fails is out; of all failing, the first is taken."""
        choices = list(open_choices)
        if len(choices) == 1:
            use(choices[0])
            return choices[0]
        seconds, said = {}, []
        for choice in choices:
            use(choice)
            try:
                seconds[choice] = self._seconds()
                said.append(f"{_name(choice)} {1e3 * seconds[choice]:.1f} ms")
            except Exception as error:  # compilers fail in many ways, and any other choice is as right
                reason = (str(error).strip().splitlines() or [""])[0][:200]
                said.append(f"{_name(choice)} failed ({type(error).__name__}: {reason})")
        best = min(seconds, key=lambda choice: seconds[choice]) if seconds else choices[0]
        use(best)
        print(f"trainer.{name}={_name(best)}: {', '.join(said)}.", file=sys.stderr, flush=True)
        return best

    def _seconds(self) -> float:
        """Of a forward and backward pass."""
        for batch in (self._other, self._batch, self._batch):
            self._run(batch)
        times = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            self._run(self._batch)
            times.append(time.perf_counter() - started)
        return min(times)

    def _run(self, batch: Batch) -> None:
        autocast = torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()
        try:
            with autocast:
                loss = self._mllm(batch)
            loss.backward()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._mllm.zero_grad(set_to_none=True)


def _text(lengths: Sequence[int], supervised: Sequence[int], device: torch.device) -> Batch:
    """The last tokens of each sample are supervised."""
    borders = torch.tensor([0, *lengths]).cumsum(0)
    positions = [
        torch.arange(end - min(count, length - 1) - 1, end - 1)
        for end, length, count in zip(borders[1:].tolist(), lengths, supervised, strict=True)
    ]
    targets = torch.cat(positions)
    none = torch.zeros(0, 0, 0)
    batch = Batch(
        input_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=borders.int(),
        visual_positions=torch.zeros(0, dtype=torch.int64),
        pixel_values=torch.zeros(0, 0, 0, 3, dtype=torch.uint8),
        features=none,
        feature_scales=none,
        target_positions=targets,
        targets=torch.zeros_like(targets),
        num_supervised=torch.tensor(len(targets)),
        sample_ids=torch.arange(len(lengths)),
    )
    return Batch(*(tensor.to(device) for tensor in batch))


def _name(choice: object) -> str:
    return str(getattr(choice, "name", choice))
