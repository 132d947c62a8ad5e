"""What a careful user of transformers would write for the same training: Llava and Trainer, nothing of ours.

Everything is prepared before the clock starts: token ids, labels and normalised pixels.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from morebench.config.compose import load_shape
from morebench.config.schema import Part
from morebench.models.transformers_export import to_llava
from morebench.training.stage import Stage

Row = dict[str, Tensor]


def stock_model(stage: Stage) -> LlavaForConditionalGeneration:
    """The cell's starting weights; frozen where the cell freezes."""
    mllm, image_token_id = stage.mllm, stage.mllm.llm.config.vocab_size - 1
    own_row = mllm.llm.get_input_embeddings().weight[image_token_id].detach().clone()
    exported = to_llava(mllm, load_shape(stage.config.vision.shape), image_token_id, torch.float32)
    model = LlavaForConditionalGeneration(exported.config)  # made to be saved: its tables are on no device
    model.load_state_dict(exported.state_dict())
    model.tie_weights()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with torch.no_grad():
        model.lm_head.weight[image_token_id] = own_row
    cap = mllm.llm.config.final_logit_softcapping
    # LlavaForConditionalGeneration forgets it; so Gemma2ForCausalLM bends logits
    model.lm_head.register_forward_hook(lambda module, args, logits: torch.tanh(logits / cap) * cap)
    model.requires_grad_(False)
    trained: list[nn.Module] = [model.model.multi_modal_projector]
    if Part.llm in stage.recipe.trainable:
        trained += [model.model.language_model, model.lm_head]
    for module in trained:
        module.requires_grad_(True)
    return model


class Rows(Dataset[Row]):
    """The stage's samples in its own order."""

    def __init__(self, stage: Stage) -> None:
        plan, image_token_id = stage.plan(1, 1), stage.mllm.llm.config.vocab_size - 1
        numbers = [number for step in range(plan.num_steps) for number in plan.global_batch(step).tolist()]
        self._rows = list(self._prepared(stage, numbers, image_token_id))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    @staticmethod
    def _prepared(stage: Stage, numbers: list[int], image_token_id: int) -> Iterator[Row]:
        dataset = stage.dataset(stage.plan(1, 1), 0)
        for number in numbers:
            encoded = stage.chat.encode(
                stage.data.samples[number], stage.tokenizer, dataset.num_visual_tokens, dataset.max_length
            )
            ids = torch.from_numpy(encoded.input_ids).long()
            row = {
                "input_ids": ids.masked_fill(torch.from_numpy(encoded.visual_mask), image_token_id),
                "labels": ids.masked_fill(~torch.from_numpy(encoded.supervised), -100),
            }
            if pixels := dataset.pixels(number):
                row["pixel_values"] = stage.mllm.normalise(torch.stack([*map(torch.from_numpy, pixels)]))
            yield row


def collate(rows: list[Row], pad_token_id: int) -> Row:
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }
    if images := [row["pixel_values"] for row in rows if "pixel_values" in row]:
        batch["pixel_values"] = torch.cat(images)
    return batch


class InOrder(Trainer):
    """The same global batches as ours; keeps each optimizer step's loss, mean over supervised tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        while len(self.losses) <= self.state.global_step:
            self.losses.append(0.0)
        self.losses[self.state.global_step] += loss.item()
        return loss


class Clock(TrainerCallback):
    """Seconds of every optimizer step, the wait for its data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def run_stock(stage: Stage, folder: Path, micro_batch: int, group_by_length: bool) -> dict[str, Any]:
    recipe, rows, clock = stage.recipe, Rows(stage), Clock()
    accumulation, rest = divmod(recipe.global_batch_size, micro_batch)
    assert rest == 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=recipe.optimizer.lr,
        adam_beta1=recipe.optimizer.betas[0],
        adam_beta2=recipe.optimizer.betas[1],
        adam_epsilon=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_ratio,  # below 1 it is a share
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if group_by_length else "sequential",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=stage.config.seed,
    )
    pad_token_id = stage.tokenizer.pad_token_id
    trainer = InOrder(
        model=stock_model(stage),
        args=arguments,
        train_dataset=rows,
        data_collator=lambda some: collate(some, pad_token_id),
        callbacks=[clock],
    )
    trainer.train()
    supervised = [0] * len(clock.seconds)
    for place in range(len(rows)):
        supervised[place // recipe.global_batch_size] += int((rows[place]["labels"] != -100).sum())
    return {"losses": trainer.losses, "seconds": clock.seconds, "supervised": supervised}
