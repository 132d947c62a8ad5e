"""Every choice and every experiment composes, and rows of a table differ along the axes alone."""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from morebench.config.assemble import assemble
from morebench.config.compose import (
    CONF_DIR,
    build,
    compose_config,
    experiment_names,
    groups,
    load_chat_format,
    load_config,
    load_shape,
    options,
    save_config,
)
from morebench.config.experiments import expand, load_experiment
from morebench.config.schema import AXES, Precision
from morebench.errors import ConfigError

OWN_GROUPS = [group for group in groups() if not group.startswith("hydra/")]
CHOICES = [(group, choice) for group in OWN_GROUPS for choice in options(group)]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    assert compose_config([f"{group}={choice}"]).choices[group] == choice


@pytest.mark.parametrize("group", ["llm", "vision", "resolution", "pretrain_data", "finetune_data", "suite"])
def test_labels_are_unique_in_a_group(group):
    labels = [
        yaml.safe_load((CONF_DIR / group / f"{choice}.yaml").read_text())["label"]
        for choice in options(group)
    ]
    assert len(set(labels)) == len(labels)


def test_every_choice_of_the_design_is_there():
    assert set(options("llm")) >= {
        "gemma2_2b", "phi4", "llama31_8b", "deepseek_r1_llama_8b", "gemma2_9b", "vicuna_7b", "llama3_8b",
        "phi2",
        "gemma2_tiny", "phi_tiny", "llama_tiny",
    }  # fmt: skip
    assert set(options("vision")) >= {
        "clip", "dinov2", "dinov2_reg", "siglip", "siglip2", "clip_tiny", "dinov2_tiny", "siglip_tiny",
    }  # fmt: skip
    assert set(options("resolution")) == {"native", "s2"}
    assert set(options("pretrain_data")) == {"lcs", "laion", "recap", "laion_recap", "digits"}
    assert set(options("stage")) == {"full", "pretrain", "finetune", "evaluate"}


@pytest.mark.parametrize("group", ["llm", "vision"])
def test_every_shape_and_chat_format_is_there(group):
    for choice in options(group):
        node = getattr(compose_config([f"{group}={choice}"]).config, group)
        assert load_shape(node.shape)
        if group == "llm":
            assert load_chat_format(node.chat_format)["turn"]


def test_weights_come_from_the_hub_or_from_a_builder():
    for group in ("llm", "vision"):
        for choice in options(group):
            weights = getattr(compose_config([f"{group}={choice}"]).config, group).weights
            assert (weights.hub_id is None) == (weights.revision is None) == (weights.build is not None)


def test_axis_files_hold_nothing_tunable():
    """A learning rate in an axis file would drift between rows unseen."""
    recipe = compose_config().config.stage.pretrain
    tunable = set(asdict(recipe)) | set(asdict(recipe.optimizer))
    for axis in AXES:
        for choice in options(axis):
            found = set(yaml.safe_load((CONF_DIR / axis / f"{choice}.yaml").read_text()))
            assert not found & (tunable - {"chat_format"}), f"{axis}={choice}"


@pytest.mark.parametrize(
    ("name", "count"), [("table1", 5), ("table2", 10), ("table3", 8), ("table4", 8), ("all", 23)]
)
def test_tables_have_the_papers_cells(name, count):
    assert len(load_experiment(name).cells) == count
    assert len(expand([f"experiments={name}"])) == count


def test_a_union_of_experiments_has_each_cell_once():
    def cells(names):
        return {
            tuple(text for text in row if "experiments" not in text)
            for row in expand([f"experiments={names}"])
        }

    assert len(expand(["experiments=table1,table2,table3,table4"])) == 23
    assert cells("table1,table2,table3,table4") == cells("all")


@pytest.mark.parametrize("name", experiment_names())
def test_cells_differ_only_along_declared_axes(name):
    """The controlled comparison itself: no hyperparameter may drift between rows."""
    first, *others = [vars(composed.config) for composed in assemble(expand([f"experiments={name}"]))]
    for other in others:
        assert {key for key in first if first[key] != other[key]} <= set(AXES)


def test_experiments_narrow_and_multiply():
    rows = expand(["experiments=table2", "llm=phi4", "seed=0,1"])
    assert len(rows) == 10
    assert all("llm=phi4" in row and "experiments=table2" in row for row in rows)
    with pytest.raises(ConfigError, match="no cell of table2 has it"):
        expand(["experiments=table2", "llm=phi2"])


def test_a_sweep_is_a_product():
    assert (
        len(expand(["llm=phi4,gemma2_9b", "vision=clip,siglip2", "stage.finetune.optimizer.lr=1e-5,2e-5"]))
        == 8
    )


def test_assembled_cells_equal_hydras_own():
    rows = expand(
        [
            f"llm={','.join(options('llm'))}",
            f"vision={','.join(options('vision'))}",
            "resolution=native,s2",
            "seed=0,7",
            "stage.finetune.optimizer.lr=1e-5,2e-5",
            "vision.label=x",
        ]
    )
    assembled = assemble(rows)
    for index in random.Random(0).sample(range(len(rows)), 8):
        alone = compose_config(rows[index])
        assert assembled[index].config == alone.config
        assert assembled[index].choices == alone.choices


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_every_problem_of_an_experiment_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("morebench.config.experiments.EXPERIMENTS_DIR", tmp_path)
    row = {axis: "x" for axis in AXES}
    write(tmp_path / "odd.yaml", {"sweep": 1, "blocks": [{"cells": [row, {"llm": "a"}]}, {"grids": {}}]})
    with pytest.raises(ConfigError) as caught:
        load_experiment("odd")
    for word in ("'sweep'", "axis 'vision' is not named", "block 1", "`grid:`"):
        assert word in str(caught.value)
    write(
        tmp_path / "cells.yaml", {"pin": {"seed": 3}, "blocks": [{"cells": [row, row, {**row, "llm": "y"}]}]}
    )
    assert load_experiment("cells").cells == ({"seed": "3", **row}, {"seed": "3", **row, "llm": "y"})


def test_config_survives_its_file(tmp_path):
    config = compose_config(["llm=gemma2_tiny", "suite=digits", "recipe=digits"]).config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.stage.finetune.precision is Precision.fp32


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("llm: {labell: 1}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")


def test_build_refuses_two_owners_of_a_value():
    recipe = {"_target_": "fractions.Fraction", "numerator": 3}
    assert build(recipe, denominator=6) * 2 == 1
    with pytest.raises(ConfigError, match="numerator"):
        build(recipe, numerator=1)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=0",
        "trainer.devices=-1",
        "trainer.devices=abc",
        "trainer.accelerator=foo",
        "trainer.num_nodes=0",
        "trainer.hang_timeout_minutes=-1",
        "trainer.checkpoint_every_n_minutes=-1",
    ],
)
def test_a_machine_that_cannot_be_is_refused_when_composing(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} must be .*, found {value}"):
        compose_config([override])
