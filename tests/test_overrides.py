"""Mistakes are found before Hydra runs, all at once, each with the nearest right name."""

from pathlib import Path

import pytest

from morebench.config.compose import CONFIG_DIR_VARIABLE
from morebench.config.overrides import check
from morebench.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("llm=gema2_tiny", ["llm=gema2_tiny", "Did you mean gemma2_tiny?"]),
        ("vision=clip,sigl1p2", ["sigl1p2", "Did you mean siglip2?"]),
        ("stage.finetune.optimizer.lrr=1", ["Did you mean stage.finetune.optimizer.lr?"]),
        ("seed=-1", ["seed must be 0 to 4294967295, found -1"]),
        ("stage.finetune.epochs=0", ["stage.finetune.epochs must be 1 or more, found 0"]),
        ("stage.pretrain.optimizer.lr=nan", ["stage.pretrain.optimizer.lr must be 0 or more, found nan"]),
        ("stage.finetune.optimizer.lr=fast", ["stage.finetune.optimizer.lr=fast", "fast"]),
        ("stage.finetune.precision=bf16,fp61", ["fp61", "bf16"]),
        ("sede=1", ["Did you mean seed?"]),
        ("seed.x=1", ["seed has no keys below it"]),
        ("+llm.foo=1", ["+llm.foo=1", "chosen, not grown"]),
        ("~llm", ["chosen, not grown"]),
        ("llm", ["KEY=VALUE"]),
        ("experiments=tabel2", ["Did you mean table2?"]),
        ("hydra/launcher=slrum", ["Known: local"]),
        ("trainer=cup", ["Did you mean cpu?"]),
    ],
)
def test_a_mistake_names_itself_and_the_right_name(override, words):
    with pytest.raises(ConfigError) as caught:
        check([override])
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        check(["llm=x1", "vision=x2", "seed=x3", "+x4=1", "x5.y=1", "experiments=x6"])
    for number in range(1, 7):
        assert f"x{number}" in str(caught.value)


def test_right_overrides_pass():
    check(
        [
            "llm=gemma2_9b,phi4",
            "vision=siglip2,clip",
            "seed=0,1,2",
            "stage.finetune.optimizer.lr=1e-5",
            "stage=pretrain",
        ]
    )
    check(["experiments=table1,table2", "hydra/launcher=local", "hydra.launcher.n_jobs=2"])


@pytest.mark.parametrize(
    ("override", "words"),
    [("llm=phi4,gemma2_9b", "Add -m"), ("experiments=table2", "train -m experiments=table2")],
)
def test_one_cell_is_not_many(override, words):
    with pytest.raises(ConfigError, match=words):
        check([override], multirun=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("lable: Mine\n", "Key 'lable' not in 'LLM'"),
        ("visual_scale: two\n", "two"),
        ("a: [\n", "while parsing"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "mine.yaml").write_text(content)
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check(["llm=mine"])
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_wrong_value_of_a_sweep_is_named():
    check(["seed=0,7,4294967295", "trainer.num_workers=0,8", "stage.finetune.max_steps=1,null"])
    with pytest.raises(ConfigError) as caught:
        check(["seed=7,x,-1,8,4294967296,1.5", "trainer.num_nodes=1,0"])
    wrong = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert wrong == ["seed=x", "seed=-1", "seed=4294967296", "seed=1.5", "trainer.num_nodes=0"]
