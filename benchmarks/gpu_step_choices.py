"""What the train engine would choose for micro-batches that are given."""

from collections.abc import Callable
from dataclasses import replace

import torch
from gpu_step_batches import Micro

from morebench.config.schema import Attention, Config, TrainRecipe
from morebench.models.memory import image_bytes, memory
from morebench.models.room import find_room
from morebench.training.choices import Choices, this_machine, threads_for
from morebench.training.choosing import usable
from morebench.training.probe import Probe


def chosen(config: Config, recipe: TrainRecipe, batches: list[Micro], device: torch.device) -> Choices:
    """As `training.choosing.choose`, but for the number of tokens. Measures on a GPU what is left open."""
    trainer = config.trainer
    attentions, losses = usable(config, recipe, device.type)
    attention, loss_kernel, compiled = attentions[0], losses[0], bool(trainer.compile)
    heaviest = max(batches, key=lambda micro: len(micro.batch.input_ids))
    if device.type == "cuda":
        lengths = [len(one.encoded.input_ids) for one in heaviest.samples]
        supervised = [int(one.encoded.supervised[1:].sum()) for one in heaviest.samples]
        probe = Probe(config, recipe, lengths, supervised, device)
        compiles = [False, True] if trainer.compile is None else [trainer.compile]
        attention = probe.fastest("attention", attentions, probe.attend_by)
        loss_kernel = probe.fastest("loss_kernel", losses, probe.lose_by)
        compiled = probe.fastest("compile", compiles, probe.compile_or_not)
        del probe
        torch.cuda.empty_cache()
    return Choices(
        machine=this_machine(config, device, 1),
        micro_batches=len(batches),
        threads=threads_for(trainer),
        micro_batch_tokens=len(heaviest.batch.input_ids),
        recomputed=_recomputed(config, recipe, batches, attention, device),
        attention=attention.name,
        loss_kernel=loss_kernel.name,
        compile=compiled,
    )


def _recomputed(
    config: Config, recipe: TrainRecipe, batches: list[Micro], attention: Attention, device: torch.device
) -> int:
    """As the engine would, had trainer.micro_batch_tokens asked for these micro-batches."""
    tokens = max(len(micro.batch.input_ids) for micro in batches)
    config = replace(config, trainer=replace(config.trainer, micro_batch_tokens=tokens))

    def kept(micro: Micro, recomputed: int) -> int:
        return sum(
            memory(
                config,
                len(one.encoded.input_ids),
                len(one.pixels),
                int(one.encoded.supervised[1:].sum()),
                recipe.trainable,
                recomputed,
                attention,
            ).sample
            + len(one.pixels) * image_bytes(config)
            for one in micro.samples
        )

    def heaviest(_: int) -> Callable[[int], float]:
        return lambda recomputed: max(kept(micro, recomputed) for micro in batches)

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return find_room(config, recipe, 1, free, heaviest).recomputed
