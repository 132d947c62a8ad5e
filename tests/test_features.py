"""Cached features are the computed ones, are never silently others, and survive a kill."""

import json
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories_data import paths_below, record, toy_data, write_data
from factories_features import (
    Encoder,
    build_features,
    build_until,
    feature_cell,
    loss_and_gradients,
    stage_of,
    with_changes,
)
from factories_training import losses, with_recipe, with_trainer
from gradients import distance
from safetensors.torch import load_file, save_file
from training_processes import finish, start

from morebench.config.schema import AspectRatio, Config, Features, Precision, Step
from morebench.data.checked import open_checked
from morebench.data.checking.check import check_data
from morebench.data.features import FeatureCache, ImageNumbers, shard_name
from morebench.errors import DataError, DiskFullError, Interrupted, NonFiniteError
from morebench.matrix.features import cache_of_step
from morebench.models.features import from_8bit, num_scales, to_8bit
from morebench.training import feature_estimate
from morebench.training.choices import Choices, this_machine
from morebench.training.feature_build import build_cache
from morebench.training.feature_estimate import Need, break_even, check_disk, encoded_by_a_run
from morebench.training.features import CacheOf
from morebench.training.run import train
from morebench.training.signals import StopRequest

PAD, SQUARE = AspectRatio.pad, AspectRatio.square
SHARDS = 5  # 33 images, 8 in a shard


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return feature_cell(tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def cache(config: Config) -> CacheOf:
    return build_features(config)


@pytest.fixture
def copy(config: Config, cache: CacheOf, tmp_path: Path) -> CacheOf:
    """A cache to break."""
    place = tmp_path / "features"
    shutil.copytree(cache.folder, place / cache.folder.name)
    return replace(cache, place=place)


def opened(config: Config, cache: CacheOf) -> FeatureCache:
    data = open_checked(config.pretrain_data, config.paths)
    return FeatureCache(cache.folder, ImageNumbers.of(data.samples), "BUILD")


def in_copy(config: Config, copy: CacheOf) -> Encoder:
    encoder = Encoder(config)
    encoder.cache = copy
    return encoder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("vision", ["clip_tiny", "siglip_tiny"])
@pytest.mark.parametrize(("scales", "aspect_ratio"), [([1], PAD), ([1], SQUARE), ([1, 2, 3], PAD)])
def test_losses_and_gradients_are_those_of_computed_features(
    tmp_path: Path, vision: str, scales: list[int], aspect_ratio: AspectRatio
) -> None:
    """One micro-batch; 20 of them: some text-only, four empty."""
    cell = feature_cell(tmp_path, vision, scales=scales, aspect_ratio=aspect_ratio)
    build_features(cell)
    for step, micro_batches in ((Step.pretrain, 1), (Step.finetune, 1), (Step.finetune, 20)):
        computed = stage_of(replace(cell, features=Features.computed), step, tmp_path / "parent")
        expected_loss, expected = loss_and_gradients(computed, micro_batches)
        loss, gradients = loss_and_gradients(stage_of(cell, step, tmp_path / "parent"), micro_batches)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert distance(gradients, expected) < 1e-5


def test_features_are_those_of_the_encoder_bit_by_bit(config: Config, cache: CacheOf) -> None:
    """Encoded in the same groups; in others, matrix products may round differently."""
    encoder, reader = Encoder(config), opened(config, cache)
    expected = torch.cat([encoder(encoder.dataset[range(at, at + 3)]) for at in (0, 3)])
    assert torch.equal(torch.stack([reader.read(number)[0] for number in range(6)]), expected)


def test_bf16_is_kept_as_bf16(tmp_path: Path) -> None:
    half = with_recipe(feature_cell(tmp_path), precision=Precision.bf16)
    built = build_features(half)
    features, scales = opened(half, built).read(0)
    assert features.dtype is torch.bfloat16
    assert (built.storage, scales.numel()) == ("bf16", 0)
    stage = stage_of(half, Step.pretrain, tmp_path / "parent")
    computed = stage_of(replace(half, features=Features.computed), Step.pretrain, tmp_path / "parent")
    batch = stage.dataset(stage.plan(1, 1), 0)[0]
    pixels = computed.dataset(computed.plan(1, 1), 0)[0]
    assert batch.features.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert stage.mllm(batch).item() == pytest.approx(computed.mllm(pixels).item(), rel=1e-3)


def test_8_bit_is_close(config: Config, cache: CacheOf, tmp_path: Path) -> None:
    small = replace(config, features=Features.cached_8bit)
    built = build_features(small)
    assert built.image_bytes < 0.3 * cache.image_bytes  # of fp32
    exact, rounded = opened(config, cache), opened(small, built)
    for number in range(len(exact.images)):
        expected, found = exact.read(number)[0], from_8bit(*rounded.read(number))
        assert (found - expected).norm() < 0.008 * expected.norm()
    loss, _ = loss_and_gradients(stage_of(small, Step.pretrain, tmp_path / "parent"), 1)
    expected_loss, _ = loss_and_gradients(stage_of(config, Step.pretrain, tmp_path / "parent"), 1)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert loss != expected_loss


@pytest.mark.parametrize("width", [16, 64, 1152, 3456, 50])
def test_8_bit_is_off_by_half_a_step_of_its_block(width: int) -> None:
    """Also where a channel is a thousand times larger, at zeros, and at numbers too small to divide by."""
    torch.manual_seed(0)
    features = torch.randn(2, 5, width)
    features[..., 3] *= 1000
    features[0, 0] = 0
    features[0, 1] *= 1e-42
    values, scales = to_8bit(features)
    assert values.dtype is torch.int8
    assert scales.shape == (2, 5, num_scales(width))
    blocks = features.unflatten(-1, (num_scales(width), -1)).abs().amax(-1, keepdim=True)
    bound = (blocks / 254 * 1.0001).expand(-1, -1, -1, width // num_scales(width)).flatten(-2) + 2e-38
    assert ((from_8bit(values, scales) - features).abs() <= bound).all()


def test_a_run_on_cached_features_is_the_run_on_computed_ones(
    config: Config, cache: CacheOf, tmp_path: Path
) -> None:
    train(replace(config, features=Features.computed), Step.pretrain, tmp_path / "computed", {})
    train(with_trainer(config, num_workers=2), Step.pretrain, tmp_path / "cached", {})
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "computed"), rel=1e-5)
    facts = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("cached", "computed")]
    assert facts[0]["features"] == {"from": "cached", "cache": cache.folder.name}
    assert facts[0]["weights"] == facts[1]["weights"]


def test_another_kind_of_features_is_another_machine(config: Config) -> None:
    """So a resume says that it is not bit-exact; a checkpoint from before the choice computed its own."""
    computed, cached = (
        this_machine(replace(config, features=f), torch.device("cpu"), 1)
        for f in Features
        if "8" not in f.name
    )
    assert computed != cached
    facts = Choices(computed, 1, 1, 16384).facts()
    assert Choices.from_facts(facts).machine == computed
    del facts["machine"]["features"]
    assert Choices.from_facts(facts).machine == computed


def test_the_vision_encoder_is_not_loaded(config: Config, cache: CacheOf, tmp_path: Path) -> None:
    stage = stage_of(config, Step.finetune, tmp_path)
    assert not list(stage.mllm.get_submodule("vision").parameters())
    with pytest.raises(RuntimeError, match="built for cached features"):
        stage.mllm.encode_images(torch.zeros(1, 56, 56, 3, dtype=torch.uint8))


def test_killed_in_a_shard_goes_on_to_the_same_bytes(config: Config, cache: CacheOf, tmp_path: Path) -> None:
    again = replace(config, paths=replace(config.paths, cache=str(tmp_path)))
    assert finish(start(build_until, again, 20)) == [-signal.SIGKILL]
    encoder = Encoder(again)
    folder = encoder.cache.folder
    assert not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match=r"no complete feature cache: no manifest\.json\. Build it: BUILD"):
        opened(again, encoder.cache)
    kept = len(files(folder))
    assert kept in (1, 2)  # the second may not be on the disk yet
    (folder / f"{shard_name(2)}.tmp-1").write_bytes(b"torn")
    with (folder / "shards.jsonl").open("a") as journal:
        journal.write('{"shard": 2, "bytes"')
    assert encoder.build() == SHARDS - kept
    assert encoder.encoded == 33 - 8 * kept
    assert files(folder) == files(cache.folder)
    assert (folder / "manifest.json").read_bytes() == (cache.folder / "manifest.json").read_bytes()
    assert not list(folder.glob("*.tmp-*"))


def test_asked_to_stop_it_keeps_what_is_finished(config: Config, copy: CacheOf) -> None:
    shutil.rmtree(copy.folder)
    encoder = in_copy(config, copy)

    def stopping(pixels: torch.Tensor) -> torch.Tensor:
        if encoder.encoded > 16:
            signal.raise_signal(signal.SIGTERM)
        return encoder(pixels)

    with StopRequest() as stop, pytest.raises(Interrupted, match="SIGTERM asked to stop"):
        build_cache(
            copy,
            encoder.dataset,
            stopping,
            per_call=3,
            num_workers=0,
            stop=stop,
            shard_bytes=8 * copy.image_bytes,
        )
    assert len(files(copy.folder)) == 2
    encoder.encoded = 0
    assert encoder.build() == SHARDS - 2
    assert encoder.encoded == 33 - 16


def test_a_whole_cache_is_not_computed_again(config: Config, copy: CacheOf) -> None:
    encoder = in_copy(config, copy)
    assert (encoder.build(), encoder.encoded) == (0, 0)


def test_a_flipped_bit_is_refused_and_mended(config: Config, copy: CacheOf, cache: CacheOf) -> None:
    path = copy.folder / shard_name(1)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # of the last image of the shard
    path.write_bytes(content)
    reader = opened(config, copy)
    reader.read(8)
    with pytest.raises(
        DataError, match=r"shard-00001\.safetensors: the features of image 15 \(21\.png\) are"
    ):
        reader.read(15)
    encoder = in_copy(config, copy)
    assert (encoder.build(), encoder.encoded) == (1, 8)
    assert files(copy.folder) == files(cache.folder)


def test_another_shard_of_the_same_size_is_refused(config: Config, copy: CacheOf) -> None:
    shutil.copyfile(copy.folder / shard_name(2), copy.folder / shard_name(1))
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: the features of image 8"):
        opened(config, copy).read(8)


def test_missing_and_cut_shards_are_all_named(config: Config, copy: CacheOf) -> None:
    (copy.folder / shard_name(0)).unlink()
    with (copy.folder / shard_name(3)).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError) as caught:
        opened(config, copy)
    assert "shard-00000.safetensors is missing." in str(caught.value)
    assert "shard-00003.safetensors has 100 bytes; " in str(caught.value)
    assert "Mend it: BUILD" in str(caught.value)
    assert in_copy(config, copy).build() == 2
    opened(config, copy)


def test_training_without_a_cache_says_how_to_build_it(config: Config, tmp_path: Path) -> None:
    other = with_changes(config, aspect_ratio=SQUARE)
    wanted = r"data cache features=cached stage=pretrain"
    with pytest.raises(DataError, match=rf"holds no complete feature cache.*{wanted}"):
        train(other, Step.pretrain, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_the_key_follows_whatever_changes_a_feature(config: Config, tmp_path: Path) -> None:
    def digest(changed: Config) -> str:
        return cache_of_step(changed, Step.pretrain)[0].digest

    image, vision = config.vision.image, config.vision
    same = [
        config,
        replace(config, seed=5),
        replace(config, vision=replace(vision, label="Other")),
        replace(config, llm=replace(config.llm, chat_format="llama_3_1")),
        with_recipe(config, max_length=77),
        with_trainer(config, num_workers=3),
    ]
    other_weights, other_data = tmp_path / "weights", tmp_path / "data"
    shutil.copytree(str(vision.weights.folder), other_weights)
    tensors = load_file(next(other_weights.glob("*.safetensors")))
    save_file({k: v + 1 for k, v in tensors.items()}, next(other_weights.glob("*.safetensors")))
    shutil.copytree(config.paths.data, other_data)
    shutil.copyfile(other_data / "toy/images/1.png", other_data / "toy/images/2.png")
    elsewhere = replace(config.paths, data=str(other_data), checks=str(tmp_path / "checks"))
    check_data(config.pretrain_data, elsewhere, 0, lambda text: None)
    different = [
        config,
        with_changes(config, scales=[1, 2]),
        with_changes(config, aspect_ratio=SQUARE),
        with_changes(config, features=Features.cached_8bit),
        with_recipe(config, precision=Precision.bf16),
        replace(config, vision=replace(vision, feature_layer=-1)),
        replace(config, vision=replace(vision, image=replace(image, mean=[0.1, 0.2, 0.3]))),
        replace(config, vision=replace(vision, weights=replace(vision.weights, folder=str(other_weights)))),
        replace(config, paths=elsewhere),
    ]
    assert len({digest(changed) for changed in same}) == 1
    assert len({digest(changed) for changed in different}) == len(different)


def test_a_cache_is_found_under_another_label(config: Config, cache: CacheOf) -> None:
    renamed = replace(config, vision=replace(config.vision, label="Other"))
    assert cache_of_step(renamed, Step.pretrain)[0].folder == cache.folder


def test_features_that_are_not_finite_are_refused(config: Config, copy: CacheOf) -> None:
    shutil.rmtree(copy.folder)
    encoder = in_copy(config, copy)

    def wild(pixels: torch.Tensor) -> torch.Tensor:
        features = encoder(pixels)
        if encoder.encoded > 16:
            features[0, 0, 0] = torch.inf
        return features

    with pytest.raises(NonFiniteError, match=r"for 3 images, the first of them 22.png"):
        encoder.build(encode=wild)
    assert set(files(copy.folder)) == {shard_name(0), shard_name(1)}


def test_images_are_numbered_once_and_without_those_of_quarantined_samples(tmp_path: Path) -> None:
    shown = ["2.png", None, "0.png", "2.png", "1.png", "0.png"]
    write_data(tmp_path, [record(n, image) for n, image in enumerate(shown)], images=3)
    samples = check_data(toy_data(), paths_below(tmp_path), 0, lambda text: None).data.samples
    whole, part = ImageNumbers.of(samples), ImageNumbers.of(samples.without([0, 4]))
    assert whole.names.to_pylist() == ["2.png", "0.png", "1.png"]
    assert [whole.of_sample(n) for n in range(6)] == [[0], [], [1], [0], [2], [1]]
    assert part.names.to_pylist() == ["0.png", "2.png"]
    assert [part.of_sample(n) for n in range(4)] == [[], [0], [1], [0]]
    assert (whole.shown, part.shown) == (5, 3)


def test_a_reader_travels_to_a_worker_after_it_was_used(config: Config, cache: CacheOf) -> None:
    reader = opened(config, cache)
    before = reader.read(4)
    assert torch.equal(pickle.loads(pickle.dumps(reader)).read(4)[0], before[0])


def test_a_full_disk_is_refused_before_anything_is_written(
    cache: CacheOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_estimate, "free_bytes", lambda place: 5_000_000)
    elsewhere = replace(cache, place=tmp_path / "none" / "yet")
    check_disk([Need(elsewhere, 5_000_000, 0), Need(elsewhere, 3_000_000, 3_000_000)])
    with pytest.raises(DiskFullError, match=r"\(2\) need 6\.00 MB more, but 5\.00 MB are free on the disk"):
        check_disk([Need(elsewhere, 5_000_000, 1_000_000), Need(elsewhere, 2_000_000, 0)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("distinct", "by_a_run", "runs"),
    [(558_128, 558_128, 2), (300_000, 624_610, 1), (100, 30, 4), (90, 30, 4)],
)
def test_a_cache_pays_once_runs_would_have_encoded_more(distinct: int, by_a_run: int, runs: int) -> None:
    found, text = break_even(distinct, by_a_run)
    assert found == runs
    assert f"{distinct:,}" in text
    assert f"{by_a_run:,}" in text


def test_a_run_encodes_as_often_as_it_shows(config: Config) -> None:
    data = open_checked(config.pretrain_data, config.paths)
    images = ImageNumbers.of(data.samples)
    recipe = config.stage.pretrain  # 2 epochs of 44 samples, 33 of them with an image; batches of 16
    assert encoded_by_a_run(recipe, 44, images) == 66
    assert encoded_by_a_run(replace(recipe, max_steps=1), 44, images) == 12
    assert encoded_by_a_run(replace(recipe, max_steps=100), 44, images) == 66
