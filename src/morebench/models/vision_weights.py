"""Published weights into a vision encoder: what is read must fit, and nothing else may be left over."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate

from morebench.errors import WeightsError, join_problems


@dataclass(frozen=True)
class Layout:
    """How a provider names the tensors of an image tower."""

    blocks: str  # what stands before a block's number
    positions: str
    unread: tuple[str, ...]  # what follows the blocks, or serves pre-training only


OPEN_CLIP = Layout("transformer.resblocks.", "positional_embedding", ("ln_post.", "proj", "attn_pool"))
TIMM = Layout("blocks.", "pos_embed", ("norm.", "fc_norm.", "attn_pool.", "head.", "mask_token"))


# the same for transformers: what its checkpoints hold after the blocks and beside the image tower
_OTHER_TOWERS = ("text_", "logit_", "visual_projection.")
_HEADS = (
    *("pooler.", "head.", "classifier.", "cls_classifier.", "distillation_classifier.", "decoder."),
    "embeddings.mask_token",
)
# fields of config.json that vision.shape repeats; most leave no trace in the tensors' shapes
_STORED = (
    *("hidden_size", "num_attention_heads", "intermediate_size", "mlp_ratio", "patch_size", "image_size"),
    *("num_register_tokens", "hidden_act", "layer_norm_eps"),
)


@dataclass(frozen=True)
class PositionGrid:
    """A square grid of learned positions that the checkpoint has at another size than the encoder."""

    size: int
    num_prefix_tokens: int  # positions before the grid, kept as they are
    antialias: bool


def load_encoder(
    model: nn.Module, folder: Path, layout: Layout, num_blocks: int, grid: PositionGrid | None = None
) -> None:
    """Fill `model` from the folder's safetensors.

    The files may hold a larger model (CLIP with its text tower): the tower is the place where most of the
    wanted keys are found. Surplus is legitimate for blocks above the layer that is read, for `layout.unread`
    and for whatever stands outside the tower; `num_blocks` is how many blocks the checkpoint must have, read
    or not. A position grid is resampled if `grid` announces it. Raises one WeightsError for all tensors that
    are missing, misfitting or left over.
    """
    files = _files_of_keys(folder)
    wanted = model.state_dict()
    tower = _tower(files, wanted, folder, type(model).__name__)
    holding = {path for key in wanted for path in files.get(tower + key, ())}
    present = {
        key.removeprefix(tower): paths[0]
        for key, paths in files.items()
        if key.startswith(tower) and holding.intersection(paths)
    }
    problems = [
        f"{key}: both in {paths[0].name} and in {paths[1].name}"
        for key, paths in files.items()
        if len(paths) > 1 and key.startswith(tower) and key.removeprefix(tower) in wanted
    ]
    problems += block_count_problems(present, re.escape(layout.blocks), num_blocks)
    state = {}
    for key, parameter in wanted.items():
        if key not in present:
            problems.append(f"{tower}{key}: missing")
            continue
        tensor = _tensor(present[key], tower + key)
        if key == layout.positions and grid is not None:
            tensor = _resample(tensor, grid, parameter.shape)
        if tensor.shape != parameter.shape:
            problems.append(f"{tower}{key}: shape {list(tensor.shape)}, expected {list(parameter.shape)}")
        state[key] = tensor
    unread = (*layout.unread, layout.blocks)  # a surplus block is either above the layer or counted already
    built = {_block(key, layout.blocks) for key in wanted} - {None}
    problems += left_over(
        tower + key
        for key in present.keys() - wanted.keys()
        if not key.startswith(unread) or _block(key, layout.blocks) in built
    )
    refuse(folder, problems)
    model.load_state_dict(state)


def refuse(folder: Path, problems: Collection[str]) -> None:
    if problems:
        raise WeightsError(join_problems([f"The weights in {folder} do not fit the shape:", *problems]))


def block_count_problems(keys: Iterable[str], blocks: str, num_blocks: int) -> list[str]:
    """`blocks`: a pattern of what stands before a block's number. Layers are counted from the end, so a
    checkpoint with more blocks than the shape is as wrong as one with fewer."""
    numbers = {int(match[1]) for key in keys if (match := re.match(rf"(?:{blocks})(\d+)\.", key))}
    found = max(numbers, default=-1) + 1
    return [] if found == num_blocks else [f"{found} blocks, but the shape says {num_blocks}"]


def left_over(keys: Iterable[str]) -> list[str]:
    """Names with the block's number left out and counted, so that 24 blocks take one line."""
    counts: dict[str, int] = {}
    for key in sorted(keys):
        name = re.sub(r"\.\d+\.", ".*.", key)
        counts[name] = counts.get(name, 0) + 1
    return [
        f"{name}: {count} in the file, which the encoder has no place for" for name, count in counts.items()
    ]


def _files_of_keys(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    files.setdefault(key, []).append(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or no safetensors file ({error}).") from error
    if not files:
        raise WeightsError(f"{folder} has no *.safetensors with tensors in it.")
    return files


def _tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def _tower(files: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, kind: str) -> str:
    """What stands before the tower's keys. A text tower may share many of the names, never all."""
    anchor = max(wanted, key=len)
    candidates = [key.removesuffix(anchor) for key in files if key == anchor or key.endswith(f".{anchor}")]
    if not candidates:
        names = sorted({path.name for paths in files.values() for path in paths})
        raise WeightsError(
            f"{folder} has no tensor {anchor} in {names}, so it is no checkpoint for {kind}. "
            "Is vision.encoder the right class for these weights?"
        )
    return max(candidates, key=lambda tower: (sum(tower + key in files for key in wanted), -len(tower)))


def _block(key: str, blocks: str) -> str | None:
    return key.removeprefix(blocks).split(".")[0] if key.startswith(blocks) else None


def _resample(positions_1PC: Tensor, grid: PositionGrid, shape: torch.Size) -> Tensor:
    """Bicubic, in fp32, as transformers does in every forward. A grid of another size stays as it is."""
    prefix, patches = positions_1PC.split_with_sizes(
        [grid.num_prefix_tokens, positions_1PC.shape[1] - grid.num_prefix_tokens], dim=1
    )
    if patches.shape[1] != grid.size**2:
        return positions_1PC
    new = round((shape[1] - grid.num_prefix_tokens) ** 0.5)
    map_1CHW = patches.float().unflatten(1, (grid.size, grid.size)).permute(0, 3, 1, 2)
    resampled = interpolate(map_1CHW, size=(new, new), mode="bicubic", antialias=grid.antialias)
    return torch.cat([prefix, resampled.flatten(2).mT.to(prefix.dtype)], dim=1)


def load_pretrained(config: Any, folder: Path, blocks: str, num_blocks: int, unread: tuple[str, ...]) -> Any:
    """transformers itself reads its checkpoints, because it renames the keys of older ones.

    `config` says what is built, `blocks` and `unread` name the modules that hold the blocks and that follow
    them; the other arguments, and what is refused, are those of `load_encoder`.
    """
    from transformers import AutoModel

    _check_stored_config(config, folder, num_blocks)
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The weights in {folder} do not fit the shape: {error}") from error
    missing, surplus = set(report["missing_keys"]), set(report["unexpected_keys"])
    tower = rf"^(?:{re.escape(model.base_model_prefix)}\.|vision_model\.)?"
    *above, listed = blocks.split(".")  # DINOv3's files leave out what is above the list
    surplus = {
        re.sub(rf"^{listed}\.", ".".join([*above, listed, ""]), re.sub(tower, "", key))
        for key in surplus
        if not key.startswith(_OTHER_TOWERS)
    }
    problems = block_count_problems(
        (model.state_dict().keys() - missing) | surplus, re.escape(f"{blocks}."), num_blocks
    )
    built = {str(number) for number in range(config.num_hidden_layers)}
    heads = (*(f"{name}." for name in unread), *_HEADS)
    problems += [f"{key}: missing" for key in sorted(missing) if not key.startswith(heads)]
    problems += left_over(
        key
        for key in surplus
        if not key.startswith((*heads, f"{blocks}.")) or _block(key, f"{blocks}.") in built
    )
    refuse(folder, problems)
    return model


def _check_stored_config(config: Any, folder: Path, num_blocks: int) -> None:
    """Heads, activation and epsilon leave no trace in the tensors' shapes: config.json must agree."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        return
    try:
        stored = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder / 'config.json'} is no config of transformers: {error}") from error
    stored = getattr(stored, "vision_config", stored)
    wanted = {key: getattr(config, key) for key in _STORED if hasattr(config, key)}
    wanted |= {"model_type": config.model_type, "num_hidden_layers": num_blocks}
    refuse(
        folder,
        [
            f"{key}: {getattr(stored, key)} in config.json, {value} in vision.shape and vision.encoder"
            for key, value in wanted.items()
            if hasattr(stored, key) and getattr(stored, key) != value
        ],
    )
