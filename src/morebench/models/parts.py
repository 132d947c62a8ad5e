"""Parts of a cell: assembled from a config, frozen, saved and loaded as one safetensors file each."""

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from morebench.config.compose import build, load_shape
from morebench.config.schema import Config, Part, Precision, VisualScale
from morebench.config.visual import vision_problems
from morebench.errors import ConfigError, WeightsError, join_problems
from morebench.models.features import AbsentEncoder
from morebench.models.llm import load_llm, unread_llm
from morebench.models.mllm import MLLM
from morebench.models.multiscale import MultiScale
from morebench.models.normalise import Normalise
from morebench.models.projector import MLPProjector
from morebench.models.vision import VisionEncoder


def build_mllm(
    config: Config,
    weights: Mapping[Part, Path | None],
    precision: Precision,
    trainable: Collection[Part] = (),
    with_vision: bool = True,
    llm_unread: bool = False,
) -> MLLM:
    """The cell's model, with everything but `trainable` frozen.

    `weights` of a part: a folder of starting weights, a file that `save_parts` wrote, or None (the
    projector's seeded start; random weights of the shape otherwise). Trained parts are fp32; frozen ones are
    bf16 if `precision` is. Without vision, features come from a cache. `llm_unread` leaves the LLM's
    parameters on the meta device, with `MLLM.unread` to fill them from, for strategies that shard it first.
    """
    folders = {part: path if path is not None and path.is_dir() else None for part, path in weights.items()}

    def dtype(part: Part) -> torch.dtype:
        return torch.float32 if part in trainable or precision is Precision.fp32 else torch.bfloat16

    encoder = build_encoder(config, folders.get(Part.vision)) if with_vision else _absent_encoder(config)
    unread = None
    if llm_unread:
        path = weights.get(Part.llm)
        assert path is not None
        llm, unread = unread_llm(config.llm, path, dtype(Part.llm))
    else:
        llm = load_llm(config.llm, folders.get(Part.llm), dtype(Part.llm))
    llm_dim: int = llm.config.hidden_size
    projector = MLPProjector(encoder.feature_dim, llm_dim, config.projector.depth)
    projector.initialise(config.seed)
    scaled = config.llm.visual_scale is VisualScale.sqrt_hidden
    scale = math.sqrt(llm_dim) if scaled else 1.0
    mllm = MLLM(Normalise(config.vision.image), encoder, projector, llm, scale, unread)
    skipped = {Part.vision: not with_vision, Part.llm: llm_unread}
    for part in Part:
        path = weights.get(part)
        if path is not None and not path.is_dir() and not skipped.get(part):
            load_part(mllm, part, path)
        if part is not Part.llm:  # built in its dtype; rotary tables stay fp32
            module(mllm, part).to(dtype(part))
    freeze_all_but(mllm, trainable)
    return mllm


def build_encoder(config: Config, folder: Path | None) -> VisionEncoder:
    """The vision encoder at the cell's resolution. Its `image_size` is what the images must be resized to.

    Raises one ConfigError for all that is wrong with the shape, the layer and the scales.
    """
    shape, layer = load_shape(config.vision.shape), config.vision.feature_layer
    if problems := vision_problems(config.vision, shape, config.resolution):
        raise ConfigError(join_problems(problems))
    encoder = build(config.vision.encoder, shape=shape, weights=folder, feature_layer=layer)
    return encoder if config.resolution.scales == [1] else MultiScale(encoder, config.resolution.scales)


def _absent_encoder(config: Config) -> AbsentEncoder:
    with torch.device("meta"):
        return AbsentEncoder(build_encoder(config, None))


def module(mllm: MLLM, part: Part) -> nn.Module:
    return mllm.get_submodule(part.name)


def freeze_all_but(mllm: MLLM, parts: Collection[Part]) -> None:
    if Part.vision in parts:
        raise ConfigError(
            "trainable: vision is always frozen (blocks after its feature layer are not built). "
            "Choose of: projector, llm."
        )
    for part in Part:
        module(mllm, part).requires_grad_(part in parts)


def save_parts(
    mllm: MLLM, parts: Collection[Part], folder: Path, gathered: Mapping[str, Tensor] | None = None
) -> list[Path]:
    """Write `<folder>/<part>.safetensors` each, a tied head once; aside first, then renamed.

    `gathered`: whole parameters by their name in the MLLM, where it holds only pieces of them itself.
    """
    values = gathered or {}
    written = []
    for part in parts:
        tied = tied_copies(module(mllm, part))
        state = {
            key: values.get(f"{part.name}.{key}", tensor).detach().cpu().contiguous()
            for key, tensor in module(mllm, part).state_dict().items()
            if key not in tied
        }
        path = folder / f"{part.name}.safetensors"
        save_tensors(state, path)
        written.append(path)
    return written


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Aside first, then to the disk, then renamed. Mapped tensors go from file to file, not into memory."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.touch()
    mode = aside.stat().st_mode
    save_file(state, aside, metadata={"format": "pt"})
    aside.chmod(mode)  # safetensors writes for the owner alone, and the users of a cluster share runs
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def load_part(mllm: MLLM, part: Part, path: Path) -> None:
    """Fill one part from a file of `save_parts`. Raises one WeightsError for all that differs."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; the run that writes it has not finished.")
    target = module(mllm, part)
    tied = tied_copies(target)
    wanted = {key: tensor for key, tensor in target.state_dict().items() if key not in tied}
    with safe_open(path, "pt") as file:
        state: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    problems = [f"{key}: not in the file" for key in wanted.keys() - state.keys()]
    problems += [f"{key}: not in the {part.name}" for key in state.keys() - wanted.keys()]
    problems += [
        f"{key}: {list(state[key].shape)} in the file, {list(wanted[key].shape)} in the {part.name}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if problems:
        raise WeightsError(
            join_problems([f"{path} does not fit this cell's {part.name}:", *sorted(problems)])
        )
    target.load_state_dict(state, strict=False)  # strict but for the tied copies


def tied_copies(part: nn.Module) -> set[str]:
    """Names under which a parameter appears a second time, e.g. a head tied to the embeddings."""
    first = {name for name, _ in part.named_parameters()}
    return {name for name, _ in part.named_parameters(remove_duplicate=False)} - first
