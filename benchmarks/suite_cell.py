"""The cell of benchmarks/suite.py: LLaVA-1.5's shapes over Llama-3.1, a byte tokenizer, no weights."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from morebench.config.compose import compose_config, load_chat_format, load_shape
from morebench.config.schema import Config, Profile, Weights
from morebench.config.visual import num_visual_tokens
from morebench.data.chat import ChatFormat, Encoded
from morebench.models.llm import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_data import paths_below, tokenizer_for


def make_config(root: Path, num_rows: Mapping[str, int], profile: Profile) -> Config:
    """Evaluates suite llava_more_13 from `root`/data. `num_rows`: rows that each task has there."""
    tokenizer_for("llama_3_1").save_pretrained(root / "llm")
    config = compose_config(["llm=llama31_8b", "vision=clip", "stage=evaluate", "trainer=cpu"]).config
    tasks = {
        name: replace(task, data=replace(task.data, num_rows=num_rows[name]))
        for name, task in config.suite.tasks.items()
    }
    nowhere = Weights(folder=str(root / "llm"), hub_id=None, revision=None, build=None)
    return replace(
        config,
        llm=replace(config.llm, weights=nowhere),
        vision=replace(config.vision, weights=nowhere),
        paths=paths_below(root),
        suite=replace(config.suite, tasks=tasks),
        stage=replace(config.stage, evaluate=replace(config.stage.evaluate, profile=profile)),
    )


def prompter(config: Config) -> Callable[[str], Encoded]:
    """Question -> its prompt, as the evaluate step makes it."""
    tokenizer = load_tokenizer(config.llm, Path(str(config.llm.weights.folder)))
    chat = ChatFormat.from_dict(load_chat_format(config.llm.chat_format))
    count = num_visual_tokens(load_shape(config.vision.shape))
    return partial(chat.encode_prompt, tokenizer=tokenizer, num_visual_tokens=count)
