"""Which files of a data set hold a config's split: from their names and the README alone, as on the hub."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from morebench.errors import DataError

README = "README.md"
DEFAULT = "default"
PARQUET = ".parquet"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(.*)")
_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@dataclass(frozen=True)
class Layout:
    """config -> split -> names below the folder, in the order of the rows."""

    configs: Mapping[str, Mapping[str, Sequence[str]]]

    def files(self, config: str | None, split: str) -> Sequence[str]:
        """Raises DataError with the reason alone."""
        wanted = config or DEFAULT
        splits = self.configs.get(wanted)
        if splits is None:
            raise DataError(f"there is no config {wanted}; there is: {_listed(self.configs)}")
        if split not in splits:
            raise DataError(f"config {wanted} has no split {split}; it has: {_listed(splits)}")
        if lacking := _lacking_shards(splits[split]):
            raise DataError(f"config {wanted}, split {split} is not complete; it lacks {', '.join(lacking)}")
        return splits[split]


def layout_of(names: Iterable[str], readme: str | None) -> Layout:
    """`names` with slashes. What the README's `configs` say; without them what the names look like.

    Only parquet is looked at: never a data set script. Configs and splits without a file are left out.
    """
    files = sorted(name for name in names if name.endswith(PARQUET) and not name.startswith("."))
    stated = _stated_configs(readme) if readme else []
    configs: dict[str, dict[str, list[str]]] = {}
    for entry in stated:
        found: dict[str, list[str]] = {}
        for split, patterns in _patterns(entry):
            matching = re.compile("|".join(map(_as_regex, patterns)))
            if hits := [name for name in files if matching.fullmatch(name)]:
                found.setdefault(split, []).extend(hits)
        if found:
            configs[str(entry["config_name"])] = found
    return Layout(configs or _inferred(files))


def _stated_configs(readme: str) -> list[dict[str, Any]]:
    """Those that name their files."""
    head = _FRONT_MATTER.match(readme.replace("\r\n", "\n"))
    if head is None:
        return []
    try:
        content = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise DataError(f"the YAML at the top of {README} cannot be read: {error}") from error
    configs = (content.get("configs") if isinstance(content, dict) else None) or []
    if not isinstance(configs, list) or not all(isinstance(c, dict) and "config_name" in c for c in configs):
        raise DataError(
            f"`configs` of {README} must be a list of entries with a config_name, found {configs!r}"
        )
    return [entry for entry in configs if "data_files" in entry]


def _patterns(entry: Mapping[str, Any]) -> Iterable[tuple[str, list[str]]]:
    """Split and globs. `data_files` is a list of {split, path}; paths alone are a `train` split."""
    files = entry["data_files"]
    for one in files if isinstance(files, list) else [files]:
        split, path = (one.get("split"), one.get("path")) if isinstance(one, dict) else ("train", one)
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not all(isinstance(path, str) for path in paths):
            raise DataError(
                f"`data_files` of config {entry['config_name']} in {README}: expected split and path, "
                f"found {one!r}"
            )
        yield split, [path.removeprefix("./") for path in paths]


def _as_regex(glob: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return "".join(_GLOB.get(part, re.escape(part)) for part in parts)


def _inferred(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """`<config>/<split>-*.parquet`, `<config>/<split>/*.parquet`; `data/` or none: the default config."""
    configs: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name in files:
        *folders, file = name.split("/")
        split = folders[1] if len(folders) == 2 else file.removesuffix(PARQUET).split("-")[0]
        if len(folders) <= 2:
            config = DEFAULT if not folders or folders[0] == "data" else folders[0]
            configs[config].setdefault(split, []).append(name)
    return configs


def _lacking_shards(names: Sequence[str]) -> list[str]:
    """Of files numbered -00000-of-00003."""
    lacking: list[str] = []
    for name in names:
        if shard := _SHARD.fullmatch(name):
            start, number, total, _ = shard.groups()
            others = [shard for other in names if (shard := _SHARD.fullmatch(other))]
            have = {int(other[2]) for other in others if (other[1], other[3]) == (start, total)}
            lacking += [f"{start}-{n:0{len(number)}}-of-{total}" for n in range(int(total)) if n not in have]
    return sorted(set(lacking))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none with a parquet file"
