"""Check training data before anything is launched: every record parsed, every image decoded, once.

    python -m morebench.data check pretrain_data=lcs
    python -m morebench.data check finetune_data=mix665k llm=phi4,gemma2_9b vision=siglip2
    python -m morebench.data check experiments=table2

Takes the overrides of `python -m morebench.train -m`, workers=N (processes; all cores if not given), and
again=true (read every image, also those that have kept their size and times).

Checked are the data sets that are named, or else both of every cell. Where the tokenizers of the cells' LLMs
are here, token lengths are measured too: training uses them.

What no cell can use is quarantined, the same way for every LLM and encoder: missing or damaged images,
records that are none, empty answers. What is odd but was used by the study (ids that repeat, a GIF called
.jpg) is counted and kept; also_quarantine=[...] of the data choice leaves it out as well.

checks/<folder>/<records>/ gets manifest.json, quarantine.jsonl, findings.jsonl (kept), lengths.png and
suspicious.png. Type the command again after an interruption, or after mending files: what has not changed is
not read again. Exits with 2 where data cannot be trained on as it is.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morebench import entry
from morebench.config.assemble import assemble
from morebench.config.compose import Composed, Override, load_chat_format, load_shape, parse_overrides
from morebench.config.experiments import expand
from morebench.config.overrides import check
from morebench.config.schema import LLM, Config, Step, TrainingData
from morebench.config.visual import num_visual_tokens
from morebench.data.chat import ChatFormat
from morebench.data.checked import CheckedData, check_folder, usability_problems
from morebench.data.checking.check import Checked, Measure, check_data
from morebench.data.checking.lengths import length_name
from morebench.data.findings import Kind
from morebench.data.index import LengthIndex, index_of
from morebench.errors import (
    EXIT_DONE,
    EXIT_USER,
    ConfigError,
    DataError,
    WeightsError,
    join_problems,
    resumable,
)
from morebench.models.weights import absence, locate
from morebench.processes import usable_cores

GROUPS = {"pretrain_data": Step.pretrain, "finetune_data": Step.finetune}


def command(arguments: Sequence[str]) -> int:
    overrides, workers, again = _split(arguments)
    check(overrides)
    parsed = parse_overrides(overrides)
    cells = assemble(expand(overrides))
    named = [group for group in GROUPS if any(_is_below(override, group) for override in parsed)]
    wanted = _wanted(cells, named or list(GROUPS))
    measures, unmeasured = _measures(cells, wanted)
    if unmeasured and any(_is_below(override, "llm") for override in parsed):
        raise WeightsError(join_problems(unmeasured))
    for sentence in unmeasured:
        print(f"token lengths are not measured: {sentence}", file=sys.stderr)
    problems: list[str] = []
    for key, (data, config) in wanted.items():
        try:
            with resumable(Path(config.paths.checks), Path(config.paths.cache)):
                found = check_data(data, config.paths, workers, _say, measures[key], again)
        except DataError as error:
            problems.append(str(error))
            continue
        _print(found, data, config)
        problems += found.problems
        problems += usability_problems(found.data.manifest, data, config.paths, config.max_quarantined)
    if problems:
        print(f"error: {join_problems(problems)}", file=sys.stderr)
    return EXIT_USER if problems else EXIT_DONE


def _print(found: Checked, data: TrainingData, config: Config) -> None:
    manifest = found.data.manifest
    again = "" if found.num_looked_at == manifest.num_images else f", {found.num_looked_at:,} read now"
    size = f"{manifest.image_bytes / 1e9:.1f} GB" if manifest.image_bytes > 1e8 else "small"
    print(f"{manifest.label}: {manifest.num_records:,} records")
    print(f"  images       {manifest.num_images:,} ({size}{again})")
    print(f"  samples      {manifest.num_samples:,}, content {manifest.content_hash[:12]}")
    print(f"  quarantined  {manifest.num_quarantined:,} ({manifest.quarantined_share:.3%})")
    _print_counts(manifest.quarantined)
    if manifest.kept:
        print("  odd, but kept")
        _print_counts(manifest.kept)
    for name, facts in manifest.tokens.items():
        quantiles = facts["quantiles"]
        print(
            f"  tokens       {name}: median {quantiles['50']:,}, 99 % {quantiles['99']:,}, most "
            f"{quantiles['100']:,}; {facts['truncated']:,} samples cut, {facts['unsupervised']:,} without a "
            "supervised token"
        )
    print(f"  written      {check_folder(data, config.paths)}/")


def _print_counts(counts: Mapping[str, int]) -> None:
    for kind, count in counts.items():
        print(f"    {count:>9,} {Kind[kind].value} ({kind})")


def _split(arguments: Sequence[str]) -> tuple[list[str], int, bool]:
    """The overrides of the config, the number of processes, and whether to read all images again."""
    rest, own, problems = [], {"workers": str(usable_cores()), "again": "false"}, []
    for text in arguments:
        key, _, value = text.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(text)
    if not (own["workers"].isascii() and own["workers"].isdigit() and int(own["workers"])):
        problems.append(f"workers={own['workers']}: expected a whole number from 1.")
    if own["again"] not in ("true", "false"):
        problems.append(f"again={own['again']}: expected true or false.")
    if problems:
        raise ConfigError(join_problems(problems))
    return rest, int(own["workers"]), own["again"] == "true"


def _is_below(override: Override, group: str) -> bool:
    return f"{override.key}.".startswith(f"{group}.")


def _wanted(cells: Sequence[Composed], groups: Sequence[str]) -> dict[str, tuple[TrainingData, Config]]:
    """Every data set once, by its place. Raises ConfigError where one is to be checked in two ways."""
    found: dict[str, tuple[TrainingData, Config]] = {}
    problems: dict[str, None] = {}
    for group in groups:
        for cell in cells:
            data: TrainingData = getattr(cell.config, group)
            known, _ = found.setdefault(_place(data), (data, cell.config))
            for key in ("images", "allowed_links", "also_quarantine"):
                if (one := getattr(known, key)) != (other := getattr(data, key)):
                    problems[f"{_place(data)} has one check, but {key} is {one} and {other} here."] = None
    if problems:
        raise ConfigError(join_problems(problems))
    return found


def _place(data: TrainingData) -> str:
    return f"{data.folder}/{data.records}"


def _measures(
    cells: Sequence[Composed], wanted: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Measure]], list[str]]:
    """By data set and by what they are called, and a sentence for every tokenizer that is not here."""
    measures: dict[str, dict[str, Measure]] = {key: {} for key in wanted}
    absent: dict[str, None] = {}
    seen: set[str] = set()
    for cell in cells:
        config = cell.config
        folder = locate(config.llm.weights, config.paths)
        if folder is None:
            absent[absence(config.llm.weights, config.paths)] = None
            continue
        for group, step in GROUPS.items():
            data: TrainingData = getattr(config, group)
            key = _place(data)
            job = LengthJob.of(config, step, folder)
            if key in wanted and (identity := f"{key} {step} {job}") not in seen:
                seen.add(identity)
                chat = ChatFormat.from_dict(load_chat_format(job.chat_format)).label
                name = length_name(cell.choices["llm"], chat, job.num_visual_tokens, job.max_length)
                if name in measures[key]:
                    name += f" ({len(measures[key])})"  # other values below the choice of the LLM
                measures[key][name] = job
    return measures, list(absent)


@dataclass(frozen=True)
class LengthJob:
    """A `Measure`."""

    llm: LLM
    folder: Path  # of the tokenizer
    chat_format: Any
    num_visual_tokens: int
    max_length: int
    cache: Path

    @classmethod
    def of(cls, config: Config, step: Step, folder: Path) -> "LengthJob":
        recipe = config.stage.pretrain if step is Step.pretrain else config.stage.finetune
        return cls(
            config.llm,
            folder,
            recipe.chat_format or config.llm.chat_format,
            num_visual_tokens(load_shape(config.vision.shape)),
            recipe.max_length,
            Path(config.paths.cache),
        )

    def __call__(self, data: CheckedData) -> LengthIndex:
        from morebench.models.llm import load_tokenizer

        return index_of(
            data.samples,
            data.content_hash,
            ChatFormat.from_dict(load_chat_format(self.chat_format)),
            load_tokenizer(self.llm, self.folder),
            self.num_visual_tokens,
            self.max_length,
            self.cache,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
