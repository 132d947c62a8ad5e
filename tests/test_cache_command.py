"""`python -m morebench.data cache`, and training that asks for what it built."""

from pathlib import Path

import pytest

from morebench.cache_features import command
from morebench.config.assemble import assemble
from morebench.config.experiments import expand
from morebench.errors import ConfigError, DataError, DiskFullError, RunError
from morebench.matrix.cell import cells_of
from morebench.matrix.features import check_features
from morebench.matrix.ledger import locked
from morebench.matrix.plan import make_plan
from morebench.training import feature_estimate

ONE = ["pretrain_data=digits", "finetune_data=digits", "recipe=digits", "trainer=cpu", "tracking=none"]
ONE += ["llm=llama_tiny", "vision=clip_tiny", "suite=digits"]


@pytest.fixture
def here(world: Path, tmp_path: Path) -> list[str]:
    """One cell of the shared world with a cache folder of its own; the parts are linked."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "parts").symlink_to(world / "cache" / "parts")
    return [*ONE, f"paths.root={tmp_path}", f"paths.data={world}/data", f"paths.checks={world}/checks"]


def caches(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in tmp_path.glob("cache/features/*/manifest.json"))


def test_estimate_says_what_it_costs_and_writes_nothing(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two LLMs share a cache: a line for both."""
    command([*here, "llm=llama_tiny,phi_tiny", "resolution=s2", "estimate=true"])
    out = capsys.readouterr().out
    assert "clip_tiny-s2-digits-square (fp32)" in out
    assert "96 images x 24,584 bytes = 2.36 MB; 0 bytes there already" in out
    assert "building encodes 96 images, a run by itself 96: it pays from the second run on" in out
    assert "of pretrain's FLOPs the encoder's share: 71% with llama_tiny, 7" in out
    assert "images/s" in out
    assert out.count("fp32") == 2  # pretrain and finetune
    assert not (tmp_path / "cache" / "features").exists()


def test_a_sweep_builds_every_cache_once(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [*here, "llm=llama_tiny,phi_tiny", "vision=clip_tiny,siglip_tiny", "stage=pretrain"]
    command(sweep)
    built = caches(tmp_path)
    assert [name.rsplit("-", 1)[0] for name in built] == [
        "clip_tiny-native-digits-square",
        "siglip_tiny-native-digits-square",
    ]
    command([*here, "stage=pretrain"])
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"{tmp_path}/cache/features/{built[0]}: whole, nothing to do"
    )
    plan = make_plan(cells_of(assemble(expand([*sweep, "features=cached"]))))
    check_features(plan)


def test_training_names_all_caches_that_are_missing(here: list[str]) -> None:
    plan = make_plan(cells_of(assemble(expand([*here, "vision=clip_tiny,siglip_tiny", "features=cached"]))))
    with pytest.raises(DataError) as caught:
        check_features(plan)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith(
        "Build it: python -m morebench.data cache vision=clip_tiny resolution=native pretrain_data=digits "
        "recipe=digits stage=pretrain features=cached"
    )


def test_all_mistakes_come_at_once(here: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="siglip_tini") as caught:
        command([*here, "vision=siglip_tini", "resolution=s3"])
    assert "resolution=s3" in str(caught.value)
    with pytest.raises(ConfigError, match=r"needs no cache: cached or cached_8bit\.\nstage=evaluate encodes"):
        command([*here, "features=computed", "stage=evaluate"])
    with pytest.raises(ConfigError, match="estimate=maybe: expected estimate=true or"):
        command([*here, "estimate=maybe"])
    with pytest.raises(DataError) as missing:
        command([*here, f"paths.data={tmp_path}/none", "pretrain_data=lcs,recap", "stage=pretrain"])
    assert "llava_pretrain" in str(missing.value)
    assert "recap" in str(missing.value)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_estimate, "free_bytes", lambda place: 999)
    with pytest.raises(DiskFullError, match=r"need 787\.20 KB more, but 999 bytes are free"):
        command([*here, "stage=pretrain"])
    assert not (tmp_path / "cache" / "features").exists()


def test_a_second_builder_is_told_of_the_first(here: list[str], tmp_path: Path) -> None:
    command([*here, "stage=pretrain"])
    (name,) = caches(tmp_path)
    with (
        locked(tmp_path / "cache" / "features" / name),
        pytest.raises(RunError, match=r"clip_tiny-native-digits-square-\w+ is being run by process"),
    ):
        command([*here, "stage=pretrain"])
