"""Hydra at the door: overrides in, plain dataclasses out. Nothing else below the commands imports Hydra."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morebench.config.schema import Config, Weights
from morebench.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
CONF_DIR = ROOT / "conf"
EXPERIMENTS_DIR = ROOT / "experiments"
CONFIG_DIR_VARIABLE = "MOREBENCH_CONFIG_DIR"  # in the environment, so that worker processes know it too


@dataclass(frozen=True)
class Composed:
    """One config and the file stem chosen in each group."""

    choices: dict[str, str]
    config: Config


@dataclass(frozen=True)
class Override:
    """One parsed command-line override; a sweep has several values, each as Hydra would write it."""

    text: str
    key: str
    values: tuple[str, ...]
    is_sweep: bool
    problem: str | None = None  # the key is refused whatever its value


def register() -> None:
    """Make the schema and our resolvers known to Hydra; safe to call twice."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("morebench.root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver(
        "morebench.experiments", lambda: ", ".join(experiment_names()), replace=True
    )


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS_DIR.glob("*.yaml"))


def config_dirs() -> list[Path]:
    """conf/, then the user's own folder of further choices, laid out the same (`--config-dir DIR`)."""
    own = os.environ.get(CONFIG_DIR_VARIABLE)
    if not own:
        return [CONF_DIR]
    if not Path(own).is_dir():
        raise ConfigError(f"--config-dir {own} (or {CONFIG_DIR_VARIABLE}) is not a folder.")
    return [CONF_DIR, Path(own).resolve()]


def options(group: str) -> list[str]:
    """File stems of a config group, e.g. `options("hydra/launcher")`. Raises ConfigError for doublets."""
    found = [path.stem for folder in config_dirs() for path in (folder / group).glob("*.yaml")]
    if twice := sorted({stem for stem in found if found.count(stem) > 1}):
        folders = " and in ".join(map(str, config_dirs()))
        raise ConfigError(f"{group}/{twice[0]}.yaml is in {folders}. Give yours another name.")
    return sorted(found)


@functools.cache
def groups() -> tuple[str, ...]:
    """Groups a user may choose from: folders of YAML files that config.yaml's defaults list names."""
    defaults = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]
    named = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    return tuple(name.removeprefix("override ").strip("/") for name in named)


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Parse with Hydra's own grammar; what cannot be parsed, or is refused, carries a `problem`."""
    parsed = []
    parser = OverridesParser.create()
    for text in texts:
        try:
            override = parser.parse_override(text)
        except HydraException:
            parsed.append(Override(text, text, (), False, f"{text!r} is not KEY=VALUE in Hydra's grammar."))
            continue
        key = override.get_key_element()
        if override.is_add() or override.is_force_add() or override.is_delete():
            problem = f"{text!r}: a cell is chosen, not grown. Choose or set a key that --help lists."
            parsed.append(Override(text, key, (), False, problem))
        elif override.is_sweep_override():
            values = tuple(str(value) for value in override.sweep_string_iterator())
            parsed.append(Override(text, key, values, True))
        else:
            parsed.append(Override(text, key, (override.get_value_element_as_str(),), False))
    return parsed


def compose_config(overrides: Sequence[str] = ()) -> Composed:
    """Compose conf/config.yaml with `overrides`, e.g. `["llm=phi4", "seed=1"]`.

    Raises ConfigError with Hydra's reason. Names of keys and choices are checked with better messages by
    `morebench.config.overrides.check`.
    """
    register()
    try:
        if GlobalHydra.instance().is_initialized():  # inside a command that Hydra itself started
            tree = GlobalHydra.instance().hydra.compose_config(  # type: ignore[union-attr]
                "config", list(overrides), run_mode=_run_mode()
            )
        else:
            own = [f"hydra.searchpath=[file://{folder}]" for folder in config_dirs()[1:]]
            with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
                tree = compose(config_name="config", overrides=[*overrides, *own], return_hydra_config=True)
        choices = {str(key): str(value) for key, value in tree.hydra.runtime.choices.items()}
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        config = cast(Config, OmegaConf.to_object(tree))  # typed by the schema, the first of the defaults
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot compose {' '.join(overrides)}: {reason(error)}") from error
    if problems := list(out_of_bounds(config)):
        raise ConfigError(f"Cannot compose {' '.join(overrides)}: {'; '.join(problems)}")
    return Composed(choices, config)


def out_of_bounds(node: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for every number or text outside the bounds its field declares."""
    for field in fields(node):
        name, value = f"{prefix}{field.name}", getattr(node, field.name)
        if is_dataclass(value):
            yield from out_of_bounds(value, f"{name}.")
        elif value is not None and (bounds := field.metadata.get("bounds")):
            low, high = bounds
            if not low <= value <= (inf if high is None else high):
                wanted = f"{low} or more" if high is None else f"{low} to {high}"
                yield f"{name} must be {wanted}, found {value}"
        elif spelling := field.metadata.get("spelt"):
            pattern, wanted = spelling
            if not re.fullmatch(pattern, value):
                yield f"{name} must be {wanted}, found {value}"


def not_plainly_right(config: Config, override: Override) -> list[str]:
    """The values that only composing can judge; the others are whole numbers within the field's bounds."""
    *path, name = override.key.split(".")
    node: Any = config
    for part in path:
        node = getattr(node, part, None)
    field = (
        next((field for field in fields(node) if field.name == name), None) if is_dataclass(node) else None
    )
    if field is None or field.type not in (int, int | None):
        return list(override.values)
    low, high = field.metadata.get("bounds", (-inf, inf))
    upper = inf if high is None else high
    return [v for v in override.values if not (v.isascii() and v.isdigit() and low <= int(v) <= upper)]


def _run_mode() -> Any:
    from hydra.types import RunMode

    return RunMode.RUN


def reason(error: BaseException) -> str:
    """Hydra hides why an override was refused in `__cause__`; one or two lines of it are enough."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    cause = error.__cause__ or error
    first, *others = [line.strip() for line in str(cause).splitlines() if line.strip()] or [repr(cause)]
    # "In 'llm/mine': ConfigKeyError raised while composing config:", and then what for
    return f"{first} {others[0]}" if first.endswith(":") and others else first


def to_config(tree: Any) -> Config:
    """The dataclass tree of a composed (or loaded) OmegaConf tree, every interpolation resolved."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree)))


def save_config(config: Config, path: Path) -> None:
    """Folders of weights among the runs are written relative to `path`, so that these can be moved."""
    runs = path.absolute().parent.parent

    def written(folder: Path) -> Path:
        inside = folder.absolute().is_relative_to(runs)
        return (
            Path(os.path.relpath(folder.absolute(), path.absolute().parent)) if inside else folder.absolute()
        )

    aside = path.with_name(f".{path.name}.{os.getpid()}")  # another launch may be reading it just now
    aside.write_text(OmegaConf.to_yaml(OmegaConf.structured(_place_weights(config, written))))
    aside.replace(path)


def load_config(path: Path) -> Config:
    """What `save_config` wrote; relative folders of weights are relative to `path`."""
    try:
        config = to_config(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path} is not a config this version wrote: {reason(error)}") from error
    return _place_weights(config, lambda folder: Path(os.path.normpath(path.absolute().parent / folder)))


def _place_weights(config: Config, place: Callable[[Path], Path]) -> Config:
    def placed(weights: Weights) -> Weights:
        return (
            weights if weights.folder is None else replace(weights, folder=str(place(Path(weights.folder))))
        )

    return replace(
        config,
        llm=replace(config.llm, weights=placed(config.llm.weights)),
        vision=replace(config.vision, weights=placed(config.vision.weights)),
    )


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with whole groups (`suite=digits`) taken from conf/ and then values (`suite.x=1`) set.

    Raises ConfigError with Hydra's reason.
    """
    tree = OmegaConf.structured(config)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        for override in sorted(parsed, key=lambda each: each.get_key_element() not in groups()):
            key = override.get_key_element()
            if key in groups():
                node = getattr(compose_config([str(override.input_line)]).config, key)
                OmegaConf.update(tree, key, OmegaConf.structured(node), merge=False)
            else:
                OmegaConf.update(tree, key, override.value())
        changed = to_config(tree)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"Cannot apply {' '.join(overrides)}: {reason(error)}") from error
    if problems := list(out_of_bounds(changed)):
        raise ConfigError(f"Cannot apply {' '.join(overrides)}: {'; '.join(problems)}")
    return changed


def build(recipe: Mapping[str, Any], **runtime: Any) -> Any:
    """Make the object a recipe (`_target_`) describes, adding what only run time knows.

    Two calls, because `instantiate(recipe, **runtime)` would turn a dataclass among `runtime` into a dict
    and a tuple into a list.
    """
    if twice := sorted(recipe.keys() & runtime.keys()):
        raise ConfigError(f"{recipe['_target_']}: {twice} is known only at run time. Remove it from YAML.")
    return instantiate({**recipe, "_partial_": True}, _convert_="all")(**runtime)


def load_shape(shape: str | dict[str, Any]) -> dict[str, Any]:
    """Shape fields of a published configuration: given as they are, or in `conf/shapes/<shape>`."""
    if isinstance(shape, dict):
        return shape
    return cast(dict[str, Any], json.loads(_read("shapes", shape)))


def load_chat_format(chat_format: str | dict[str, Any]) -> dict[str, Any]:
    """A chat format as data: given as it is, or in `conf/chat_formats/<chat_format>.yaml`."""
    if isinstance(chat_format, dict):
        return chat_format
    return deepcopy(_parsed(_read("chat_formats", f"{chat_format}.yaml")))


@functools.lru_cache
def _parsed(text: str) -> dict[str, Any]:
    """A thousand cells share a few formats, and YAML is slow."""
    return cast(dict[str, Any], yaml.safe_load(text))


def _read(kind: str, name: str) -> str:
    paths = [folder / kind / name for folder in config_dirs()]  # an absolute name stands for itself
    for path in paths:
        if path.is_file():
            return path.read_text()
    known = sorted({other.name for path in paths for other in path.parent.glob(f"*{path.suffix}")})
    raise ConfigError(f"conf/{kind}/{name} does not exist. There are: {', '.join(known)}.")
