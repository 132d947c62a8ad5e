"""`python -m morebench.check`: what fits passes, and every way not to fit is named."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories_training import make_cell
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

from morebench.check import command
from morebench.config.compose import compose_config
from morebench.config.schema import Config, VisualScale
from morebench.conformance.cell import examine
from morebench.conformance.findings import Finding, Verdict
from morebench.errors import ConfigError
from morebench.models.attention import VARLEN, varlen_attention


def verdicts(findings: list[Finding]) -> Counter[Verdict]:
    return Counter(finding.verdict for finding in findings)


def failures(config: Config) -> dict[str, str]:
    return {f"{f.topic}: {f.what}": f.found for f in examine(config) if f.verdict is Verdict.failed}


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_cell_with_its_weights_passes_everything(family: str, tmp_path: Path) -> None:
    findings = list(examine(make_cell(tmp_path, family)))
    assert [f for f in findings if f.verdict is Verdict.failed] == []
    assert verdicts(findings)[Verdict.skipped] == 0
    by_name = {(f.topic, f.what): f.found for f in findings}
    assert "starting weights, fp32" in by_name["model", "computed with"]
    assert {
        ("LLM", "attention"),
        ("finetune", "packed = apart"),
        ("finetune text", "prompt"),
    } <= by_name.keys()
    assert by_name["finetune text", "supervised"].startswith("'A cat.<")


def test_without_weights_shapes_are_checked_and_the_rest_is_named() -> None:
    config = compose_config(["llm=phi4", "vision=dinov2_reg", "resolution=s2"]).config
    findings = list(examine(config))
    assert verdicts(findings)[Verdict.failed] == 0
    assert {f.topic for f in findings if f.verdict is Verdict.skipped} == {"weights", "tokenizer"}
    by_name = {(f.topic, f.what): f.found for f in findings}
    assert by_name["sizes", "visual tokens"] == "256 of width 3072, from 672 pixels a side"
    assert by_name["sizes", "projector"].endswith("18,880,512 parameters")
    assert "shapes alone" in by_name["model", "computed with"]


def test_small_models_are_computed_even_without_weights() -> None:
    findings = list(examine(compose_config(["llm=phi_tiny", "vision=siglip_tiny", "recipe=digits"]).config))
    assert verdicts(findings)[Verdict.failed] == 0
    assert ("pretrain", "packed = apart") in {(f.topic, f.what) for f in findings}


def leaky(*args: Any, cu_seqlens: Any = None, **kwargs: Any) -> Any:
    return varlen_attention(*args, cu_seqlens=[0, args[1].shape[2]], **kwargs)


def uncapped(*args: Any, softcap: Any = None, **kwargs: Any) -> Any:
    return varlen_attention(*args, **kwargs)


@pytest.mark.parametrize(("wrong", "row"), [(leaky, "packed = apart"), (uncapped, "LLM: attention")])
def test_attention_that_is_not_the_llms_own_fails(wrong: Any, row: str, tmp_path: Path) -> None:
    AttentionInterface.register(VARLEN, wrong)
    try:
        assert any(row in name for name in failures(make_cell(tmp_path)))
    finally:
        AttentionInterface.register(VARLEN, varlen_attention)


def test_weights_of_another_shape_fail(tmp_path: Path) -> None:
    config = make_cell(tmp_path)
    file = tmp_path / "weights" / "tiny" / "llm" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 7}))
    found = failures(config)
    assert "sliding_window" in " ".join(found.values())
    assert "says 12" in " ".join(found.values())


def test_a_chat_format_of_another_family_fails(tmp_path: Path) -> None:
    config = make_cell(tmp_path)
    wrong = replace(config, llm=replace(config.llm, chat_format="phi_4"))
    assert any("<|system|>" in text for text in failures(wrong).values())


@pytest.mark.parametrize(
    ("family", "scale"), [("gemma2", VisualScale.one), ("llama", VisualScale.sqrt_hidden)]
)
def test_visual_tokens_scaled_otherwise_than_text_fail(
    family: str, scale: VisualScale, tmp_path: Path
) -> None:
    config = make_cell(tmp_path, family)
    assert list(failures(replace(config, llm=replace(config.llm, visual_scale=scale)))) == ["LLM: scale"]


def test_a_folder_that_was_named_must_be_there(tmp_path: Path) -> None:
    config = make_cell(tmp_path)
    weights = replace(config.llm.weights, folder=str(tmp_path / "nix"))
    found = failures(replace(config, llm=replace(config.llm, weights=weights)))
    assert found == {"weights: llm": f"weights.folder={tmp_path / 'nix'} is not a folder on this machine."}


def test_weights_that_are_no_numbers_are_said_to_be_so(tmp_path: Path) -> None:
    config = make_cell(tmp_path, "llama")
    file = tmp_path / "weights" / "tiny" / "llm" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    assert failures(config)["LLM: weights"] == "hidden states are NaN or infinite; expected finite weights"


def test_an_error_of_foreign_code_is_a_finding(tmp_path: Path) -> None:
    config = make_cell(tmp_path)
    (tmp_path / "weights" / "tiny" / "vision" / "preprocessor_config.json").write_text("{")
    assert "JSONDecodeError" in failures(config)["image: published settings"]


def test_a_missing_pad_token_fails(tmp_path: Path) -> None:
    config = make_cell(tmp_path)
    wrong = replace(config, llm=replace(config.llm, pad_token="<nix>"))
    assert any("<nix>" in text for text in failures(wrong).values())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5], "image_std": [0.5] * 3, "resample": 2}),
        ("config.json", {"pretrained_cfg": {"mean": [0.4, 0.5, 0.5], "interpolation": "bilinear"}}),
    ],
)
def test_other_image_settings_than_the_published_fail(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = make_cell(tmp_path)
    (tmp_path / "weights" / "tiny" / "vision" / name).write_text(json.dumps(settings))
    assert list(failures(config)) == ["image: mean"]
    shown = [f.found for f in examine(config) if f.what == "interpolation"]
    assert shown in ([f"bicubic, {name} says 2"], [f"bicubic, {name} says bilinear"])


def test_the_command_prints_verdicts_and_exits_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["llm=llama_tiny", "vision=clip_tiny"]) == 0
    printed = capsys.readouterr().out
    assert "llama_tiny + clip_tiny + native: " in printed
    assert " 0 failed, 3 skipped." in printed
    with pytest.raises(ConfigError, match="Did you mean phi4"):
        command(["llm=phi5", "vision=clip_tiny"])
    with pytest.raises(ConfigError) as caught:  # refused before anything is loaded, all at once
        command(["llm=phi4", "vision=clip", "resolution.scales=[0]", "stage.finetune.max_length=30"])
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ConfigError, match=r"expected the name of a \.md file"):
        command(["llm=phi4", "table=sizes.csv"])


def test_the_table_agrees_with_what_was_worked_out_by_hand(tmp_path: Path) -> None:
    """Tokens, widths, parameters of the study; TFLOP with the last vision block, so within 2 %."""
    file = tmp_path / "sizes.md"
    cells = ["llm=gemma2_9b,phi4", "vision=clip,siglip2", "resolution=native,s2", f"table={file}"]
    assert command(cells) == 0
    rows = [line.strip("| ").split(" | ") for line in file.read_text().splitlines() if line.startswith("| ")]
    by_cell = {tuple(row[:3]): row[3:] for row in rows[1:]}
    assert len(by_cell) == 8
    for cell, tokens, widths, projector, pretrain, finetune in (
        (("gemma2_9b", "clip", "native"), "576", "1024 -> 3584", "16,522,240", 20.89, 43.08),
        (("gemma2_9b", "siglip2", "s2"), "729", "3456 -> 3584", "25,238,528", 35.19, 59.99),
        (("phi4", "clip", "s2"), "576", "3072 -> 3072", "18,880,512", 13.41, 22.23),
        (("phi4", "siglip2", "native"), "729", "1152 -> 3072", "12,982,272", 10.82, 20.67),
    ):
        row = by_cell[cell]
        assert (row[0], row[1], row[3]) == (tokens, widths, projector)
        assert float(row[5]) == pytest.approx(pretrain, rel=0.02)
        assert float(row[9]) == pytest.approx(finetune, rel=0.02)


def test_the_page_in_docs_is_what_the_command_writes(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "backbones.md"
    file = tmp_path / "sizes.md"
    command(["llm=phi2,llama31_8b", "vision=dinov2_reg,siglip", "resolution=native", f"table={file}"])
    rows = [
        line
        for line in file.read_text().splitlines()
        if line.startswith("| phi2 | d") or "| siglip |" in line
    ]
    assert len(rows) == 3
    assert set(rows) <= set(page.read_text().splitlines())
