import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories_models import CLIP_SHAPE, LLM_SHAPES, packed
from factories_vision import random_pixels
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from morebench.config.compose import compose_config, load_shape
from morebench.config.schema import Config, Part, Precision, Resolution
from morebench.errors import ConfigError, WeightsError
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.parts import build_mllm, freeze_all_but, load_part, save_parts
from morebench.models.projector import MLPProjector

TRAINED = (Part.projector, Part.llm)


def tiny_config(tmp_path: Path, family: str = "gemma2", seed: int = 0) -> Config:
    """A real cell whose LLM and encoder have the shapes of the model tests."""
    for name, shape in (("llm.json", LLM_SHAPES[family]), ("vision.json", CLIP_SHAPE)):
        (tmp_path / name).write_text(json.dumps(shape))
    choice = {"gemma2": "gemma2_tiny", "llama": "llama_tiny"}[family]
    config = compose_config([f"llm={choice}", "vision=clip_tiny", f"seed={seed}"]).config
    return replace(
        config,
        llm=replace(config.llm, shape=str(tmp_path / "llm.json")),
        vision=replace(config.vision, shape=str(tmp_path / "vision.json")),
    )


def built(config: Config, precision: Precision = Precision.fp32, trainable: Any = TRAINED) -> MLLM:
    return build_mllm(config, {}, precision, trainable)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_saved_parts_come_back(family: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, family)
    mllm = built(config)
    files = save_parts(mllm, TRAINED, tmp_path)
    assert [path.name for path in files] == ["projector.safetensors", "llm.safetensors"]
    other = build_mllm(
        replace(config, seed=1), dict(zip(TRAINED, files, strict=True)), Precision.fp32, trainable=()
    )
    for part in TRAINED:
        one, two = (model.get_submodule(part.name).state_dict() for model in (mllm, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    other.vision = mllm.vision
    batch = packed((12, 9), (True, False))
    assert torch.equal(mllm(batch), other(batch))


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_rotary_tables_stay_fp32(family: str, tmp_path: Path) -> None:
    """In bf16 a frequency would be off by up to 0.4 %, radians after a thousand positions."""
    config = tiny_config(tmp_path, family)
    half, whole = (built(config, precision, ()) for precision in (Precision.bf16, Precision.fp32))
    tables = dict(whole.llm.named_buffers())
    assert any("inv_freq" in name for name in tables)
    for name, table in half.llm.named_buffers():
        if "inv_freq" in name:
            assert table.dtype is torch.float32
            assert torch.equal(table, tables[name])
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    mllm = built(tiny_config(tmp_path))
    (path,) = save_parts(mllm, [Part.llm], tmp_path)
    with safe_open(path, "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    with torch.no_grad():
        mllm.llm.lm_head.weight.zero_()
    load_part(mllm, Part.llm, path)
    assert mllm.llm.lm_head.weight is mllm.llm.model.embed_tokens.weight
    assert mllm.llm.lm_head.weight.count_nonzero() > 0


def test_parts_are_as_readable_as_any_file(tmp_path: Path) -> None:
    (path,) = save_parts(built(tiny_config(tmp_path)), [Part.projector], tmp_path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_untied_head_is_saved(tmp_path: Path) -> None:
    (path,) = save_parts(built(tiny_config(tmp_path, "llama")), [Part.llm], tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(path).keys()


def test_a_file_of_another_cell_is_refused(tmp_path: Path) -> None:
    mllm = built(tiny_config(tmp_path))
    (path,) = save_parts(mllm, [Part.projector], tmp_path)
    state = load_file(path)
    wrong = {"0.weight": state["0.weight"][:, :8].clone(), "0.bias": state["0.bias"], "9.bias": torch.ones(1)}
    save_file(wrong, path)
    with pytest.raises(WeightsError) as caught:
        load_part(mllm, Part.projector, path)
    assert str(caught.value).splitlines()[1:] == [
        "0.weight: [32, 8] in the file, [32, 32] in the projector",
        "2.bias: not in the file",
        "2.weight: not in the file",
        "9.bias: not in the projector",
    ]
    with pytest.raises(WeightsError, match="does not exist"):
        load_part(mllm, Part.projector, tmp_path / "nix.safetensors")


@pytest.mark.parametrize("precision", list(Precision))
def test_trained_parts_are_fp32_and_frozen_ones_as_precise_as_asked(
    precision: Precision, tmp_path: Path
) -> None:
    mllm = built(tiny_config(tmp_path), precision, [Part.projector])
    frozen = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    dtypes = {part: {p.dtype for p in mllm.get_submodule(part.name).parameters()} for part in Part}
    assert dtypes == {Part.vision: {frozen}, Part.llm: {frozen}, Part.projector: {torch.float32}}
    assert {name.split(".")[0] for name, p in mllm.named_parameters() if p.requires_grad} == {"projector"}
    mllm(packed((12, 9), (True, False))).backward()


def test_bf16_with_autocast_follows_fp32(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    batch = packed((12, 9), (True, False))
    exact = built(config)(batch)
    for trainable in ([Part.projector], TRAINED):
        with torch.autocast("cpu", torch.bfloat16):
            loss = built(config, Precision.bf16, trainable)(batch)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)  # 8 bits of mantissa


def test_vision_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision is always frozen"):
        freeze_all_but(built(tiny_config(tmp_path)), [Part.vision])


def test_projector_starts_from_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = MLPProjector(8, 16, depth=2)
    torch.set_rng_state(before)
    first.initialise(seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the process's generator was drawn from"
    second = MLPProjector(8, 16, depth=2)
    second.initialise(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.initialise(seed=4)
    assert not torch.equal(first[0].weight, second[0].weight)
    wide = MLPProjector(1024, 1024, depth=2)
    wide.initialise(seed=0)
    for layer in (wide[0], wide[2]):  # uniform within 1 / sqrt(fan in), as torch's Linear
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= 1 / 32
            assert parameter.std().item() == pytest.approx(1 / 32 / 3**0.5, rel=0.05)


def test_s2_widens_the_projector(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path), resolution=Resolution(label="S2", scales=[1, 2, 3]))
    mllm = built(config)
    assert mllm.projector[0].in_features == 3 * CLIP_SHAPE["width"]
    assert mllm.vision.image_size == 3 * CLIP_SHAPE["image_size"]
    pixels = random_pixels(1, mllm.vision.image_size)
    assert mllm.encode_images(pixels).shape == (1, mllm.vision.num_visual_tokens, mllm.llm.config.hidden_size)


@pytest.mark.parametrize(
    ("llm", "counts"),
    [
        ("gemma2_2b", [7_672_320, 7_967_232, 12_390_912, 13_275_648]),
        ("phi4", [12_589_056, 12_982_272, 18_880_512, 20_060_160]),
        ("gemma2_9b", [16_522_240, 16_980_992, 23_862_272, 25_238_528]),
        ("llama31_8b", [20_979_712, 21_504_000, 29_368_320, 30_941_184]),
        ("vicuna_7b", [20_979_712, 21_504_000, 29_368_320, 30_941_184]),
    ],
)
def test_published_projectors_have_the_published_sizes(llm: str, counts: list[int]) -> None:
    llm_dim = llm_config(load_shape(f"llm/{llm}.json")).hidden_size
    cells = [("clip", 1), ("siglip2", 1), ("clip", 3), ("siglip", 3)]
    for (vision, num_scales), count in zip(cells, counts, strict=True):
        with torch.device("meta"):
            projector = MLPProjector(
                load_shape(f"vision/{vision}.json")["width"] * num_scales, llm_dim, depth=2
            )
        assert sum(parameter.numel() for parameter in projector.parameters()) == count


@pytest.mark.parametrize(("family", "scale"), [("gemma2", 32**0.5), ("llama", 1.0)])
def test_the_config_says_how_visual_tokens_are_scaled(family: str, scale: float, tmp_path: Path) -> None:
    assert built(tiny_config(tmp_path, family)).visual_scale == scale


def test_a_cell_starts_from_its_own_seed(tmp_path: Path) -> None:
    one, two = (built(tiny_config(tmp_path, seed=seed)).projector[0].weight for seed in (0, 1))
    torch.rand(3)
    again = built(tiny_config(tmp_path, seed=0)).projector[0].weight
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
