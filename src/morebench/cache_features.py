"""Keep the features of a frozen vision encoder, for runs that then read them instead of computing them.

    python -m morebench.data cache vision=siglip2 resolution=s2 estimate=true
    python -m morebench.data cache vision=siglip2 resolution=s2
    python -m morebench.train -m llm=phi4,gemma2_9b vision=siglip2 resolution=s2 features=cached

Takes the overrides of `python -m morebench.train -m`; comma lists and experiments make several caches. None
depends on the LLM: cells that differ only there share one.

stage      pretrain, finetune, or full: a cache for each of the two steps
features   cached: the encoder's own numbers, bf16 under bf16 precision; cached_8bit: half the size
estimate   true: say what it costs and when it pays, and stop

Type the same command again after an interruption: finished shards are kept. Of a complete cache, every shard
is read and compared with its hash, and built anew if it was damaged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from morebench import entry
from morebench.config.assemble import assemble
from morebench.config.compose import parse_overrides
from morebench.config.experiments import expand
from morebench.config.overrides import check
from morebench.config.schema import Config, Features, Step
from morebench.data.checked import CheckedData
from morebench.errors import ConfigError, DataError, Interrupted, MorebenchError, WeightsError, join_problems
from morebench.matrix.cell import Cell, cells_of
from morebench.matrix.ledger import locked
from morebench.matrix.plan import check_cells
from morebench.prepare import prepare

if TYPE_CHECKING:  # torch takes a second, and --help needs none
    from morebench.data.features import ImageNumbers
    from morebench.training.feature_encoder import Encode, ImageGroups
    from morebench.training.feature_estimate import Need
    from morebench.training.features import CacheOf


@dataclass
class _Job:
    cache: "CacheOf"
    config: Config  # of the first cell that reads it
    step: Step
    data: CheckedData
    images: "ImageNumbers"
    llms: dict[str, Config] = field(default_factory=dict)


def command(overrides: Sequence[str]) -> None:
    texts, only_estimate = _split(overrides)
    check(texts)
    cells = cells_of(assemble(expand(texts)))
    check_cells(cells)
    _check_choices(cells)
    prepare([_needed(cell) for cell in cells])
    jobs = _jobs(cells)
    from morebench.training.feature_build import built_bytes
    from morebench.training.feature_estimate import Need, check_disk

    needs = [Need(job.cache, len(job.images) * job.cache.image_bytes, built_bytes(job.cache)) for job in jobs]
    for job, need in zip(jobs, needs, strict=True):
        for line in _estimate(job, need):
            print(line, flush=True)
    check_disk(needs)
    if not only_estimate:
        for job in jobs:
            _build(job)


def _split(overrides: Sequence[str]) -> tuple[list[str], bool]:
    """The overrides of the config, and whether only to estimate. `features=cached` where nothing is said."""
    estimates = [text for text in overrides if text.partition("=")[0] == "estimate"]
    if wrong := [text for text in estimates if text not in ("estimate=true", "estimate=false")]:
        raise ConfigError(
            join_problems(f"{text}: expected estimate=true or estimate=false." for text in wrong)
        )
    rest = [text for text in overrides if text not in estimates]
    if not any(override.key == "features" for override in parse_overrides(rest)):
        rest.append(f"features={Features.cached.name}")
    return rest, "estimate=true" in estimates


def _check_choices(cells: Sequence[Cell]) -> None:
    problems = []
    if any(cell.config.features is Features.computed for cell in cells):
        problems.append("features=computed needs no cache: cached or cached_8bit.")
    if not any(_steps(cell) for cell in cells):
        problems.append("stage=evaluate encodes its own images: pretrain, finetune or full.")
    if problems:
        raise ConfigError(join_problems(problems))


def _steps(cell: Cell) -> list[Step]:
    return [step for step in cell.config.stage.steps if step is not Step.evaluate]


def _needed(cell: Cell) -> Config:
    """Nothing is built but the encoder and the data of these steps."""
    config = cell.config
    llm = replace(config.llm, weights=replace(config.llm.weights, build=None))
    config = replace(config, llm=llm, suite=replace(config.suite, tasks={}))
    if Step.pretrain not in _steps(cell):
        config = replace(config, pretrain_data=replace(config.pretrain_data, build=None))
    if Step.finetune not in _steps(cell):
        config = replace(config, finetune_data=replace(config.finetune_data, build=None))
    return config


def _jobs(cells: Sequence[Cell]) -> list[_Job]:
    """One for each distinct cache. Raises one DataError or WeightsError for all that is missing."""
    from morebench.data.features import ImageNumbers
    from morebench.matrix.features import cache_of_step

    jobs: dict[str, _Job] = {}
    problems: dict[str, type[MorebenchError]] = {}
    for cell in cells:
        for step in _steps(cell):
            try:
                cache, data = cache_of_step(cell.config, step)
            except (DataError, WeightsError) as error:
                problems[str(error)] = type(error)
                continue
            if cache.digest not in jobs:
                images = ImageNumbers.of(data.samples)
                if not len(images):
                    problems[f"{cache.name}: the samples show no image."] = DataError
                jobs[cache.digest] = _Job(cache, cell.config, step, data, images)
            jobs[cache.digest].llms.setdefault(cell.choices["llm"], cell.config)
    if problems:
        raise next(iter(problems.values()))(join_problems(problems))
    return list(jobs.values())


def _estimate(job: _Job, need: "Need") -> Iterator[str]:
    from morebench.conformance.cell import PRICED
    from morebench.training.feature_encoder import images_per_call, images_per_second
    from morebench.training.feature_estimate import describe, encoded_by_a_run, vision_share
    from morebench.training.stage import recipe_of

    recipe = recipe_of(job.config, job.step)[0]
    text, supervised = PRICED[job.step]
    shares = {llm: vision_share(config, recipe, text, supervised) for llm, config in job.llms.items()}
    by_a_run = encoded_by_a_run(recipe, len(job.data.samples), job.images)
    pace = None
    if need.there < need.total:
        dataset, encode = _encoder(job)
        per_call = images_per_call(job.config.resolution.scales)
        pace = images_per_second(dataset, encode, per_call, job.config.trainer.num_workers)
    yield from describe(need, len(job.images), by_a_run, pace, shares, job.step.name, text)


def _encoder(job: _Job) -> tuple["ImageGroups", "Encode"]:
    from morebench.training.feature_encoder import make_encoder
    from morebench.training.stage import recipe_of

    aspect_ratio = recipe_of(job.config, job.step)[0].image_aspect_ratio
    return make_encoder(job.config, job.cache, job.images, job.data, aspect_ratio)


def _build(job: _Job) -> None:
    from morebench.training.feature_build import build_cache
    from morebench.training.feature_encoder import images_per_call
    from morebench.training.signals import StopRequest

    job.cache.folder.mkdir(parents=True, exist_ok=True)
    dataset, encode = _encoder(job)
    with locked(job.cache.folder), StopRequest() as stop:
        try:
            written = build_cache(
                job.cache,
                dataset,
                encode,
                per_call=images_per_call(job.config.resolution.scales),
                num_workers=job.config.trainer.num_workers,
                stop=stop,
            )
        except KeyboardInterrupt:
            raise Interrupted("interrupted; the same command goes on from here.") from None
    print(f"{job.cache.folder}: {f'{written} shards written' if written else 'whole, nothing to do'}")


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
