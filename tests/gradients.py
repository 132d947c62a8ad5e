"""Loss and gradients of one optimizer step: through our Trainer, and through plain transformers."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from factories_training import GLOBAL_BATCH, with_recipe, with_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from morebench.config.schema import Config, Part, Step, Strategy
from morebench.data.batch import collate
from morebench.data.datamodule import Loader
from morebench.models import mllm
from morebench.training.module import StageModule
from morebench.training.signals import StopRequest
from morebench.training.stage import make_stage, recipe_of
from morebench.training.strategy import make_trainer, quiet_libraries, sharding_of


class Recorder(Callback):
    """What the optimizer is about to be given."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, StageModule)
        self.gradients = {name: _whole(value) for name, value in pl_module.trained().items()}


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return (
            safe_get_full_grad(parameter)
            .detach()
            .clone()
            .view(getattr(parameter, "ds_shape", parameter.shape))
        )
    gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def one_step(config: Config) -> Config:
    return with_recipe(config, max_steps=1, gradient_clip_val=None)


def ours(
    config: Config, micro_batches: int, pretrained: Path, step: Step = Step.finetune
) -> tuple[float, dict[str, Tensor]]:
    """Of the first optimizer step."""
    config = one_step(config)
    with quiet_libraries():
        trainer = make_trainer(config.trainer, recipe_of(config, step)[0])
        stage = make_stage(config, step, {Step.pretrain: pretrained})
        plan = stage.plan(trainer.world_size, micro_batches)
        trainer.accumulate_grad_batches = micro_batches
        recorder = Recorder()
        trainer.callbacks.append(recorder)
        module = StageModule(
            stage.mllm.train(),
            stage.recipe,
            num_steps=1,
            first_step=0,
            sharding=sharding_of(trainer),
            samples=[],
            stop=StopRequest(),
        )
        trainer.fit(module, Loader(stage.dataset(plan, trainer.global_rank), 0, 0))
    return module.stats.loss, recorder.gradients


class Case(NamedTuple):
    config: Config
    micro_batches: int
    step: Step = Step.finetune
    logits_per_chunk: int = mllm._LOGITS_PER_CHUNK
    recompute: bool = False


def ours_to_files(cases: Mapping[str, Case], pretrained: Path, target: Path) -> None:
    """For a rank in a process of its own, which is slow to start; each writes what it saw of every case."""
    from morebench.models import llm

    build, environment = llm._random_llm, dict(os.environ)
    for name, case in cases.items():
        mllm._LOGITS_PER_CHUNK = case.logits_per_chunk
        llm._random_llm = partial(_recomputing, build) if case.recompute else build
        os.environ |= environment  # Lightning takes out what it has read
        config = with_trainer(case.config, devices=int(os.environ["WORLD_SIZE"]))
        loss, gradients = ours(config, case.micro_batches, pretrained, case.step)
        seen = gradients | {"loss": torch.tensor(loss, dtype=torch.float64)}
        save_file(seen, target / f"{name}.rank{os.environ['LOCAL_RANK']}.safetensors")


def _recomputing(build: Callable[..., Any], *arguments: Any) -> Any:
    llm = build(*arguments)
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    return llm


def from_file(path: Path) -> tuple[float, dict[str, Tensor]]:
    gradients = load_file(path)
    return gradients.pop("loss").item(), gradients


def stock(config: Config, pretrained: Path, step: Step = Step.finetune) -> tuple[float, dict[str, Tensor]]:
    """The same batch, padded, through the stock model with its own masks and logits at every position."""
    config = with_trainer(one_step(config), strategy=Strategy.auto)
    stage = make_stage(config, step, {Step.pretrain: pretrained})
    dataset = stage.dataset(stage.plan(1, 1), 0)
    llm = AutoModelForCausalLM.from_pretrained(stage.weights[Part.llm], attn_implementation="eager")
    stage.mllm.zero_grad()
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for number in stage.plan(1, 1).global_batch(0).tolist():
        sample = stage.data.samples[number]
        encoded = stage.chat.encode(sample, stage.tokenizer, dataset.num_visual_tokens, dataset.max_length)
        pixels = dataset.pixels(number)
        batch = collate([encoded], pixels, [number], 1, dataset.processor.image_size)
        embeds = llm.get_input_embeddings()(batch.input_ids)
        if pixels:
            visual = stage.mllm.encode_images(batch.pixel_values).flatten(0, 1)
            embeds = embeds.index_put((batch.visual_positions,), visual)
        rows.append(embeds)
        supervised = torch.from_numpy(encoded.supervised)
        labels.append(torch.where(supervised, batch.input_ids, -100))
    assert len(rows) == GLOBAL_BATCH
    padded = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    targets = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    logits = llm(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    gradients = {f"projector.{name}": value.grad for name, value in stage.mllm.projector.named_parameters()}
    if Part.llm in stage.recipe.trainable:
        gradients |= {f"llm.{name}": value.grad for name, value in llm.named_parameters()}
    return loss.item(), gradients


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over all parameters."""
    assert found.keys() == expected.keys()
    errors: list[Any] = [
        (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30) for name in expected
    ]
    return max(errors).item()
