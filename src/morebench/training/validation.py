"""The loss on samples that are kept out of training, measured while a step is trained."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from morebench.data.datamodule import Loader, MicroBatches
from morebench.training.module import StageModule

EVALUATIONS = 10  # of a step, evenly spaced; the last is that of the weights it ends with


def validation_steps(num_steps: int) -> frozenset[int]:
    """Optimizer steps after which the loss is measured: all of them where they are few."""
    return frozenset(-(-num_steps * number // EVALUATIONS) - 1 for number in range(1, EVALUATIONS + 1))


class Validation:
    """Nothing of training is different afterwards: no gradient, no random number, no module's mode."""

    def __init__(
        self, batches: MicroBatches, num_steps: int, num_workers: int, beat: Callable[[str], None]
    ) -> None:
        """`batches` of this rank: one step that holds the whole slice. `beat`: the watchdog's."""
        self._beat = beat
        self._batches = batches
        self._num_workers = num_workers
        self._steps = validation_steps(num_steps)

    def is_due(self, step: int) -> bool:
        return step in self._steps

    def loss(self, trainer: Trainer, module: StageModule) -> float:
        """Mean over the supervised tokens of the slice. On all ranks at the same time."""
        device = module.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        gpus = [device] if device.type == "cuda" else []
        module.mllm.eval()
        with torch.random.fork_rng(gpus), torch.no_grad():
            for number, batch in enumerate(Loader(self._batches, 0, self._num_workers)):
                on_device = trainer.strategy.batch_to_device(batch, device)
                self._beat(f"validating micro-batch {number}")
                # as Lightning would: within the strategy's wrapper and in its precision
                of_batch = trainer.strategy.validation_step(on_device, number)
                assert isinstance(of_batch, torch.Tensor)
                loss_sum += of_batch
        module.mllm.train()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss_sum)
        return loss_sum.item() / self._batches.plan.supervised_tokens(0)
