"""Build a pre-training subset of LAION or Recap-DataComp-1B from shards that are on this machine.

    python -m morebench.data build source=recap input=DIR [images=DIR] [n=558128] [seed=0]
    python -m morebench.data build source=laion_recap input.laion=DIR input.recap=DIR [...]

source   laion, recap, or laion_recap: half of each, no image in both
input    a folder or file, or several with commas between: .tar shards with images and captions
         (webdataset), or .parquet shards of metadata
images   folder of the images of .parquet shards; input if not given. Where both kinds of shards lie in
         input, the .tar are read, or with images=... the .parquet. Links that lead out of it are followed
         to the folders of pretrain_data.allowed_links=[DIR] alone
n        number of samples; the num_samples of the pretrain_data choice if not given
seed     draws other samples; 0 if not given
workers  processes and threads; all cores if not given. Changes nothing in the result
columns.id, columns.caption, columns.image
         columns of the .parquet, or fields of the .json in tars (`txt` is the .txt), where they are not
         the published ones. image: paths below images; without it img2dataset's place of `key`

With laion_recap write input.laion=..., images.recap=..., columns.recap.caption=... and so on.

Nothing is downloaded. Records, images/ and manifest.json go to the folder of the pretrain_data choice
below paths.data, so that pretrain_data=recap finds them; images of an image folder are hard-linked where
the file system allows. What is damaged, missing, empty or twice there is left out and counted. Type the
same command again after an interruption: finished shards and images are not read again.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from morebench.config.compose import compose_config
from morebench.config.overrides import check
from morebench.config.schema import Config
from morebench.data.subset.build import Request, build, tell
from morebench.data.subset.shards import PUBLISHED, Columns, Source, find_shards
from morebench.errors import ConfigError, join_problems, resumable
from morebench.processes import usable_cores

SOURCES = {"laion": ("laion",), "recap": ("recap",), "laion_recap": ("laion", "recap")}
_NUMBERS = {"n": 1, "seed": 0, "workers": 1}  # key -> least value
_PER_SOURCE = ("input", "images", "columns.id", "columns.caption", "columns.image")


def command(arguments: Sequence[str]) -> None:
    given, texts = _split(arguments)
    name = given.pop("source", [""])[0]
    if name not in SOURCES:
        near = get_close_matches(name, SOURCES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(SOURCES)}."
        raise ConfigError(f"source={name or '...'}: expected one of the known sources. {hint}")
    texts = [f"pretrain_data={name}", *texts]
    check(texts, multirun=False)
    config = compose_config(texts).config
    problems: list[str] = []
    numbers = _numbers(given, problems)
    n = numbers.get("n", config.pretrain_data.num_samples)
    if n is None or n < len(SOURCES[name]):
        problems.append(f"n={n}: expected at least {len(SOURCES[name])}.")
    allowed = tuple(config.pretrain_data.allowed_links)
    sources = [_source(one, len(SOURCES[name]) > 1, allowed, given, problems) for one in SOURCES[name]]
    problems += [f"{key}=...: unknown here. See --help." for key in given]
    if problems or n is None:
        raise ConfigError(join_problems(problems))
    arguments_told = {
        "source": name,
        "n": n,
        "seed": numbers.get("seed", 0),
        "inputs": {source.name: told for source, told in sources},
    }
    request = Request(
        folder=Path(config.paths.data) / config.pretrain_data.folder,
        records=config.pretrain_data.records,
        images=config.pretrain_data.images,
        sources=tuple(source for source, _ in sources),
        n=n,
        seed=numbers.get("seed", 0),
        arguments=arguments_told,
    )
    with resumable(request.folder.parent):
        manifest, was_there = build(request, numbers.get("workers", usable_cores()))
    _print(manifest, request, config, was_there)


def _split(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Values by key of what is ours, and the overrides of the config; Hydra's grammar is for these alone."""
    ours: dict[str, list[str]] = {}
    rest, problems = [], []
    for text in arguments:
        key, equals, value = text.partition("=")
        if key.split(".")[0] in ("paths", "pretrain_data"):
            rest.append(text)
        elif not equals or not value:
            problems.append(f"{text!r}: expected KEY=VALUE.")
        elif key in ours:
            problems.append(f"{text}: {key} is there twice.")
        else:
            is_list = key.split(".")[0] == "input" and not Path(value).expanduser().exists()
            ours[key] = value.split(",") if is_list else [value]
    if problems:
        raise ConfigError(join_problems(problems))
    return ours, rest


def _numbers(given: dict[str, list[str]], problems: list[str]) -> dict[str, int]:
    numbers = {}
    for key, least in _NUMBERS.items():
        if key not in given:
            continue
        text = given.pop(key)[0]
        if text.isascii() and text.isdigit() and least <= int(text) < 2**64:
            numbers[key] = int(text)
        else:
            problems.append(f"{key}={text}: expected a whole number from {least} to 2^64 - 1.")
    return numbers


def _source(
    name: str,
    is_mixed: bool,
    allowed_links: tuple[str, ...],
    given: dict[str, list[str]],
    problems: list[str],
) -> tuple[Source, dict[str, Any]]:
    """The source, and what was given for it."""
    own = {}
    for key in _PER_SOURCE:
        first, _, last = key.partition(".")
        full = ".".join(filter(None, (first, name if is_mixed else "", last)))
        if full in given:
            own[key] = given.pop(full)
    where = f"input.{name}" if is_mixed else "input"
    published = PUBLISHED[name]
    nothing = Source(name, (), None, published)
    if "input" not in own:
        problems.append(f"{where}=... is missing: a folder of .tar or .parquet shards.")
        return nothing, own
    inputs = [Path(text).expanduser() for text in own["input"]]
    images = Path(own["images"][0]).expanduser() if "images" in own else None
    if images is not None and not images.is_dir():
        problems.append(f"images={images}: no such folder.")
    shards = find_shards(inputs, images)
    if isinstance(shards, str):
        problems.append(f"{where}: {shards}")
        return nothing, own
    are_tars = shards[0].is_tar
    if are_tars and "columns.image" in own:
        problems.append("columns.image=...: tar shards hold their images. Leave it out, or give images=...")
    if not are_tars and images is None:
        images = inputs[0] if inputs[0].is_dir() else inputs[0].parent
        if len(inputs) > 1:
            problems.append(f"{where}: several inputs of .parquet; say where their images are: images=DIR")
    ids = None if are_tars else published.id
    columns = Columns(
        id=tuple(own["columns.id"]) if "columns.id" in own else ids,
        caption=tuple(own.get("columns.caption", published.caption)),
        image=own.get("columns.image", [None])[0],
    )
    return Source(name, shards, None if are_tars else images, columns, allowed_links), own


def _print(manifest: dict[str, Any], request: Request, config: Config, was_there: bool) -> None:
    for name, source in manifest["sources"].items():
        print(
            f"{name}: {source['candidates']} candidates in {source['rows']} rows of "
            f"{len(source['shards'])} shards; {source['taken']} taken of {source['looked_at']} looked at"
        )
        for title, drops in (("before", source["left_out_before_ranking"]), ("then", source["left_out"])):
            if drops:
                print(f"  left out {title}: {tell(drops)}")
        for shard in source["shards"]:
            if "damage" in shard:
                print(f"  damaged, read as far as it goes: {shard['name']}: {shard['damage']}")
    print(f"records sha256: {manifest['records']['sha256']}")
    print(f"{'was here already' if was_there else 'written'}: {request.folder}", file=sys.stderr)
    if request.n != config.pretrain_data.num_samples:
        print(f"train with pretrain_data.num_samples={request.n}", file=sys.stderr)
