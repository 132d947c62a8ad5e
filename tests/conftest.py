"""What several test files share: a world on disk in which the commands run in seconds."""

import os
from pathlib import Path

import pytest

from morebench.config.assemble import assemble
from morebench.config.compose import build
from morebench.config.experiments import expand
from morebench.data.checking.check import check_data
from morebench.models.weights import built_folder

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and their processes inherit it


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MOREBENCH_ROOT of the digits experiment: little data, parts trained for two steps."""
    root = tmp_path_factory.mktemp("world")
    overrides = ["experiments=digits", f"paths.root={root}", f"paths.data={root}/data"]
    configs = [composed.config for composed in assemble(expand(overrides))]
    data = configs[0].pretrain_data
    assert data.build is not None
    counts = {"num_pretrain": 96, "num_finetune": 96, "num_test_scenes": 8, "num_test_items": 24}
    build({**data.build, **counts}, folder=root / "data" / data.folder)
    for data in (configs[0].pretrain_data, configs[0].finetune_data):
        check_data(data, configs[0].paths, 0, lambda text: None)
    for weights in [weights for c in configs for weights in (c.llm.weights, c.vision.weights)]:
        assert weights.build is not None
        build({**weights.build, "steps": 2}, folder=built_folder(weights, configs[0].paths))
    return root
