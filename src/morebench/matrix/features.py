"""Which feature cache a step of a cell reads, and whether it is there before anything starts."""

from collections.abc import Iterator

from morebench.config.schema import Config, Features, Step
from morebench.data.checked import CheckedData, open_checked
from morebench.data.features import FeatureCache, ImageNumbers
from morebench.errors import DataError, WeightsError, join_problems
from morebench.matrix.cell import Cell
from morebench.matrix.plan import Plan
from morebench.models.weights import absence, locate
from morebench.training.features import CacheOf, cache_of
from morebench.training.stage import recipe_of

_DATA_GROUP = {Step.pretrain: "pretrain_data", Step.finetune: "finetune_data"}


def cache_of_step(config: Config, step: Step) -> tuple[CacheOf, CheckedData]:
    """Raises DataError, and WeightsError where the encoder's weights are not on this machine."""
    recipe, data = recipe_of(config, step)
    checked = open_checked(data, config.paths, config.max_quarantined)
    folder = locate(config.vision.weights, config.paths)
    if folder is None:
        raise WeightsError(f"vision: {absence(config.vision.weights, config.paths)}")
    return cache_of(config, recipe, checked, folder), checked


def check_features(plan: Plan) -> None:
    """Raises one DataError for all caches that steps still to run would miss; it says what builds them."""
    if problems := list(dict.fromkeys(_problems(plan))):
        raise DataError(join_problems(problems))


def _problems(plan: Plan) -> Iterator[str]:
    for run in plan.todo():
        config = run.cell.config
        if run.step not in _DATA_GROUP or config.features is Features.computed:
            continue
        cache, data = cache_of_step(config, run.step)
        try:
            FeatureCache(cache.folder, ImageNumbers.of(data.samples), build_command(run.cell, run.step))
        except DataError as error:
            yield str(error)


def build_command(cell: Cell, step: Step) -> str:
    """Values that were set one by one must be added to it."""
    groups = ("vision", "resolution", _DATA_GROUP[step], "recipe")
    chosen = [f"{group}={cell.choices[group]}" for group in groups if group in cell.choices]
    chosen += [f"stage={step.name}", f"features={cell.config.features.name}"]
    return f"python -m morebench.data cache {' '.join(chosen)}"
