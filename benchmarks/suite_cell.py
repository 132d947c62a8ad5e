"""The cell of benchmarks/suite.py: LLaVA-1.5's shapes over Llama-3.1, a byte tokenizer, no weights."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from morebench.config.compose import compose_config
from morebench.config.schema import Config, Profile, Weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from factories_data import paths_below, tokenizer_for


def make_configs(root: Path, num_rows: Mapping[str, int]) -> dict[Profile, Config]:
    """Evaluate suite llava_more_13 from `root`/data. `num_rows`: rows that each task has there."""
    tokenizer_for("llama_3_1").save_pretrained(root / "llm")
    config = compose_config(["llm=llama31_8b", "vision=clip", "stage=evaluate", "trainer=cpu"]).config
    tasks = {
        name: replace(task, data=replace(task.data, num_rows=num_rows[name]))
        for name, task in config.suite.tasks.items()
    }
    nowhere = Weights(folder=str(root / "llm"), hub_id=None, revision=None, build=None)
    config = replace(
        config,
        llm=replace(config.llm, weights=nowhere),
        vision=replace(config.vision, weights=nowhere),
        paths=paths_below(root),
        suite=replace(config.suite, tasks=tasks),
    )
    stage = config.stage
    return {
        profile: replace(config, stage=replace(stage, evaluate=replace(stage.evaluate, profile=profile)))
        for profile in Profile
    }
