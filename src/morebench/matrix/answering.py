"""What an evaluate step computes and holds in memory, by what the tasks of its suite assume. No torch."""

from dataclasses import astuple, dataclass

from morebench.config.schema import Config, Strategy
from morebench.models.flops import answer_flops, head_dim, llm_shape, sizes
from morebench.models.memory import state_per_rank

_BYTES = 2  # of a key's or value's number
_LONGEST = 4  # the longest text, in usual ones: a batch of the longest must fit


@dataclass(frozen=True)
class Answering:
    """Of a whole suite with its controls."""

    questions: int
    images: int
    text_tokens: int
    answer_tokens: int
    prefill: float  # FLOPs
    decode: float

    @property
    def flops(self) -> float:
        return self.prefill + self.decode


def unpriced(config: Config) -> list[str]:
    """Tasks that nothing is assumed of, or whose rows are not counted before they are made."""
    tasks = config.suite.tasks.items()
    return [name for name, task in tasks if task.assumed is None or task.data.num_rows is None]


def answering(config: Config) -> Answering | None:
    """None where some task is `unpriced`."""
    model, found = sizes(config), []
    for task in config.suite.tasks.values():
        assumed, questions = task.assumed, task.data.num_rows
        if assumed is None or questions is None:
            return None
        text, answer = assumed.text_tokens, assumed.answer_tokens
        flops = answer_flops(model, assumed.images, questions, text, answer)
        found.append(
            Answering(
                questions, assumed.images, questions * text, questions * answer, flops.prefill, flops.decode
            )
        )
    times = 1 + len(config.stage.evaluate.controls)
    return Answering(*(times * sum(column) for column in zip(*map(astuple, found), strict=True)))


def answering_memory(config: Config, device_bytes: float) -> float:
    """Bytes on one device: weights in bf16, and keys and values of one batch as far as the cache has room."""
    shape, trainer = llm_shape(config), config.trainer
    per_token = 2 * _BYTES * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim(shape)
    assumed = [task.assumed for task in config.suite.tasks.values() if task.assumed is not None]
    text = max(_LONGEST * one.text_tokens + one.answer_tokens for one in assumed)
    batch = trainer.evaluate_batch_size * (sizes(config).num_visual_tokens + text) * per_token
    weights = state_per_rank(config, (), Strategy.auto, 1)
    gib = trainer.evaluate_cache_gib
    cache = max(0.0, device_bytes - weights) / 2 if gib is None else gib * 2**30  # as LoadedModel has it
    return weights + min(batch, cache)


def assumption(config: Config, work: Answering) -> str:
    return (
        f"{config.suite.label}: {work.questions:,} questions about {work.images:,} images, of "
        f"{work.text_tokens / work.questions:.0f} text tokens and answers of "
        f"{work.answer_tokens / work.questions:.1f} on average (conf/tasks)"
    )
