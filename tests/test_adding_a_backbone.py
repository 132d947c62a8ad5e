"""An LLM and an encoder nobody has heard of: one YAML file each, in a folder of the user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories_data import record, tokenizer_for, write_data
from transformers import AutoModelForCausalLM, Qwen2Config, ViTConfig, ViTModel

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VIT = {"image_size": 24, "patch_size": 8, "width": 32, "blocks": 3, "heads": 2, "mlp_dim": 64}
VIT |= {"prefix_tokens": 1, "activation": "gelu", "norm_eps": 1e-12}
TOY = {"folder": "toy", "records": "records.json", "images": "images", "num_samples": "null"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    sizes = {key: value for key, value in QWEN.items() if key != "model_type"}
    qwen = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, pad_token_id=None), dtype=torch.float32)
    qwen.save_pretrained(root / "qwen")
    tokenizer_for("chatml").save_pretrained(root / "qwen")
    vit = ViTConfig(
        image_size=24,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    ViTModel(vit).save_pretrained(root / "vit")
    write_choice(
        root / "conf" / "llm" / "qwen_mini.yaml",
        label="Qwen-mini",
        size_group="Tiny",
        weights=folder(root / "qwen"),
        shape=QWEN,
        chat_format="chatml",
        pad_token="<|endoftext|>",
        visual_scale="one",
    )
    write_choice(
        root / "conf" / "vision" / "vit_mini.yaml",
        label="ViT-mini",
        weights=folder(root / "vit"),
        shape=VIT,
        feature_layer=-2,
        encoder={"_target_": "morebench.models.vision.TransformersEncoder", "name": "vit"},
        image={
            "resize": "squash",
            "resize_to": 24,
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    )
    write_data(root, [record(n, f"{n % 3}.png") for n in range(12)], images=3, size=(30, 20))
    return root


def folder(path: Path) -> dict[str, Any]:
    return {"folder": str(path), "hub_id": None, "revision": None, "build": None}


def write_choice(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(content))


def run(verb: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"morebench.{verb}", "--config-dir", "conf", *arguments],
        env={**os.environ, "MOREBENCH_ROOT": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
    )


CELL = ["llm=qwen_mini", "vision=vit_mini"]


def test_check_passes_without_a_skip(root: Path) -> None:
    done = run("check", *CELL, "resolution=s2", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed, 0 skipped." in done.stdout
    assert "9 of width 96, from 72 pixels a side" in done.stdout


def test_both_steps_train(root: Path) -> None:
    data = [f"{kind}_data.{key}={value}" for kind in ("pretrain", "finetune") for key, value in TOY.items()]
    steps = ["stage=finetune", "recipe=digits", "stage.pretrain.max_steps=1", "stage.finetune.max_steps=1"]
    cell = [*CELL, *data, *steps, "trainer=cpu", "tracking=none"]
    refused = run("train", *cell, root=root)
    assert refused.returncode == 2
    assert "data check pretrain_data=lcs pretrain_data.folder=toy pretrain_data.records=rec" in refused.stderr
    done = run("train", *cell, "unchecked_data=check", root=root)
    assert done.returncode == 0, done.stderr
    for step in ("pretrain", "finetune"):
        (file,) = root.glob(f"runs/qwen_mini-vit_mini-*.{step}.*/metrics.jsonl")
        assert json.loads(file.read_text())["loss"] > 0


def test_a_choice_that_is_there_already_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "llm").mkdir(parents=True)
    (tmp_path / "conf" / "llm" / "phi4.yaml").write_text("label: mine\n")
    done = run("plan", "llm=phi4", root=tmp_path)
    assert done.returncode == 2
    assert "llm/phi4.yaml is in" in done.stderr
    assert "Traceback" not in done.stderr
