"""What the train engine would choose for micro-batches that are given."""

import torch
from gpu_step_batches import Micro

from morebench.config.schema import Attention, Config, Part, TrainRecipe
from morebench.models.flops import sizes
from morebench.models.memory import memory, state_per_rank
from morebench.training.choices import Choices, this_machine, threads_for
from morebench.training.choosing import usable
from morebench.training.probe import Probe
from morebench.training.room import SHARE


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
    """As few blocks as fit, of a trained LLM, unless trainer.recompute says how many."""
    blocks = sizes(config).llm_layers
    if Part.llm not in recipe.trainable:
        return 0
    if config.trainer.recompute is not None:
        return round(config.trainer.recompute * blocks)
    if device.type != "cuda":
        return 0
    state = state_per_rank(config, recipe.trainable, config.trainer.strategy, 1)
    room = int(SHARE * torch.cuda.mem_get_info(device)[0]) - state

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
            for one in micro.samples
        )

    fitting = (n for n in range(blocks) if max(kept(micro, n) for micro in batches) <= room)
    return next(fitting, blocks)
