"""The ten benchmarks in their true schemas, a hundredth of their rows, answered without a model."""

import sys
from pathlib import Path

from morebench.config.compose import ROOT
from morebench.config.schema import Config, Profile
from morebench.evaluation.asking import ask
from morebench.evaluation.run import evaluate
from morebench.evaluation.sheets import open_sheets

sys.path.insert(0, str(ROOT / "benchmarks"))
from suite_answers import replies, standing_in
from suite_cell import make_configs
from suite_records import write_mirrors

SCALE = 0.01


def make_mirrors(root: Path) -> dict[Profile, Config]:
    """Written below `root`; configs that evaluate them."""
    return make_configs(root, write_mirrors(root / "data", SCALE))


def answer(config: Config, folder: Path, manner: str | None = None) -> None:
    """Leaves in `folder` what an evaluate step leaves. `manner`: of `suite_answers.MANNERS`; None: a mix."""
    folder.mkdir()
    book = replies(ask(config, open_sheets(config)), manner)
    with standing_in(book):
        evaluate(config, folder, folder / "no_parent")
