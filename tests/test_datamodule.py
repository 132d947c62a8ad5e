"""From files to micro-batches: what is collated, that workers and resume change nothing, the length index."""

import os
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import pytest
import torch
from factories_data import chat_format, paths_below, record, tokenizer_for, toy_data, write_data
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Order, Resize
from morebench.data import index
from morebench.data.batch import Batch, collate
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.checked import CheckedData
from morebench.data.checking.check import check_data
from morebench.data.datamodule import Loader, MicroBatches, dead_workers_named
from morebench.data.image_processor import ImageProcessor
from morebench.data.images import load_image
from morebench.data.index import LengthIndex, build_index
from morebench.data.packing import BatchPlan
from morebench.errors import DataError, WorkerError

V = 4  # visual tokens per image
SIZE = 8
MAX_LENGTH = 200
TOKENIZER = tokenizer_for("gemma_2")
PROCESSOR = ImageProcessor(
    ImageProcessing(
        resize=Resize.squash,
        resize_to=SIZE,
        interpolation=Interpolation.bicubic,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    ),
    SIZE,
    AspectRatio.square,
)


def write(root: Path, num_samples: int = 21) -> CheckedData:
    """Every third sample is text-only and one has two images."""
    records = [record(i, None if i % 3 == 2 else f"{i % 5}.png") for i in range(num_samples)]
    records[4] = record(
        4, conversations=[{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "no"}]
    )
    records[4]["image"] = ["3.png", "0.png"]
    write_data(root, records, images=5, size=(9, 7))
    return check_data(toy_data(), paths_below(root), 0, lambda text: None).data


def index_of(data: CheckedData, root: Path, **changes: Any) -> LengthIndex:
    arguments: dict[str, Any] = {
        "samples": data.samples,
        "chat": chat_format("gemma_2"),
        "tokenizer": TOKENIZER,
        "num_visual_tokens": V,
        "max_length": MAX_LENGTH,
        "cache": root / "cache",
        "key": data.content_hash,
    }
    return build_index(**arguments | changes)


def dataset(data: CheckedData, root: Path, rank: int = 0, world_size: int = 1, K: int = 1) -> MicroBatches:
    plan = BatchPlan(
        index_of(data, root),
        global_batch_size=8,
        epochs=2,
        max_steps=None,
        seed=0,
        order=Order.uniform,
        world_size=world_size,
        micro_batches=K,
    )
    return MicroBatches(data, plan, chat_format("gemma_2"), TOKENIZER, PROCESSOR, V, MAX_LENGTH, rank)


def assert_equal(first: Batch, second: Batch) -> None:
    for name, one, other in zip(Batch._fields, first, second, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def encoded(ids: list[int], supervised: str, visual: str) -> Encoded:
    masks = (np.array([letter == "1" for letter in mask], np.bool_) for mask in (supervised, visual))
    return Encoded(np.array(ids, np.int32), *masks, truncated=False)


def test_collating_by_hand():
    batch = collate(
        [
            encoded([5, 0, 0, 6, 7], "00011", "01100"),
            encoded([8, 9], "11", "00"),
            encoded([0, 0, 3], "001", "110"),
        ],
        [np.full((2, 2, 3), fill, np.uint8) for fill in (1, 2)],
        [40, 10, 20],
        99,
        image_size=2,
    )
    assert batch.input_ids.tolist() == [5, 0, 0, 6, 7, 8, 9, 0, 0, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 10]
    assert batch.visual_positions.tolist() == [1, 2, 7, 8]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 2]
    # 8 is supervised but first in its sample: nothing may predict it, least of all the sample before
    assert batch.targets.tolist() == [6, 7, 9, 3]
    assert batch.target_positions.tolist() == [2, 3, 5, 8]
    assert batch.num_supervised.item() == 99
    assert batch.sample_ids.tolist() == [40, 10, 20]


def test_an_empty_bin_has_every_shape_and_type():
    empty = collate([], [], [], 7, image_size=SIZE)
    full = collate([encoded([1, 2], "01", "00")], [np.zeros((SIZE, SIZE, 3), np.uint8)], [0], 7, SIZE)
    assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]
    assert empty.pixel_values.shape == (0, SIZE, SIZE, 3)
    assert empty.cu_seqlens.tolist() == [0]
    assert len(empty.input_ids) == len(empty.targets) == len(empty.target_positions) == 0


def split(batch: Batch) -> dict[int, tuple[Any, ...]]:
    """What each sample of a batch brings along."""
    parts = {}
    images = iter(batch.pixel_values)
    for number, sample in enumerate(batch.sample_ids.tolist()):
        a, b = batch.cu_seqlens[number : number + 2].tolist()
        inside = [
            (a <= positions) & (positions < b)
            for positions in (batch.visual_positions, batch.target_positions)
        ]
        visual = batch.visual_positions[inside[0]] - a
        pixels = [next(images).tolist() for _ in range(len(visual) // V)]
        targets = (batch.target_positions[inside[1]] - a).tolist(), batch.targets[inside[1]].tolist()
        parts[sample] = (batch.input_ids[a:b].tolist(), visual.tolist(), targets, pixels)
    assert next(images, None) is None
    return parts


def test_no_machine_changes_what_an_optimizer_step_sees(tmp_path: Path):
    data = write(tmp_path)
    one = dataset(data, tmp_path)
    for world_size, K in [(1, 3), (2, 1), (2, 3), (3, 4)]:
        ranks = [dataset(data, tmp_path, rank, world_size, K) for rank in range(world_size)]
        for step in range(one.plan.num_steps):
            whole = one[step]
            dealt = [each[step * K + k] for each in ranks for k in range(K)]
            parts: dict[int, tuple[Any, ...]] = {}
            for batch in dealt:
                parts |= split(batch)
                assert batch.num_supervised == whole.num_supervised
            assert parts == split(whole)
            assert sum(len(batch.targets) for batch in dealt) == whole.num_supervised == len(whole.targets)


def test_images_reach_the_sample_that_names_them(tmp_path: Path):
    data = write(tmp_path)
    batches = dataset(data, tmp_path)
    seen = {}
    for item in range(len(batches) // 2):
        seen |= {sample: parts[3] for sample, parts in split(batches[item]).items()}
    assert sorted(seen) == list(range(21))
    for number, pixels in seen.items():
        paths = [data.images.root / image for image in data.samples[number].images]
        assert pixels == [PROCESSOR(load_image(path)).tolist() for path in paths]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resume_change_nothing(tmp_path: Path, num_workers: int):
    batches = dataset(write(tmp_path), tmp_path, rank=1, world_size=2, K=2)
    state = torch.get_rng_state()
    for first_step in (0, 2):
        loaded = list(Loader(batches, first_step, num_workers))
        assert len(loaded) == len(batches) - 2 * first_step
        for item, batch in enumerate(loaded, start=2 * first_step):
            assert_equal(batch, batches[item])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_vanished_is_named(tmp_path: Path, num_workers: int):
    data = write(tmp_path)
    batches = dataset(data, tmp_path)
    (data.images.root / "3.png").unlink()
    with pytest.raises(DataError, match=r"^record id 'r\d+': .*3\.png: No such file[^\n]*$"):
        list(Loader(batches, 0, num_workers))


class Killer(ImageProcessor):
    """Stands in for the kernel that is out of memory."""

    def __init__(self, signal: Signals) -> None:
        super().__init__(PROCESSOR.processing, SIZE, AspectRatio.square)
        self.signal = signal

    def __call__(self, image: Image.Image) -> np.ndarray:
        os.kill(os.getpid(), self.signal)
        return super().__call__(image)


@pytest.mark.parametrize("signal", [Signals.SIGKILL, Signals.SIGBUS])
def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path: Path, signal: Signals):
    batches = replace(dataset(write(tmp_path), tmp_path), processor=Killer(signal))
    with pytest.raises(WorkerError, match=r"out of memory.*trainer\.num_workers"), dead_workers_named():
        list(Loader(batches, 0, num_workers=2))


@pytest.mark.parametrize("signal", [Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGUSR2])
def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_rank(tmp_path: Path, signal: Signals):
    batches = dataset(write(tmp_path), tmp_path)
    found = list(Loader(replace(batches, processor=Killer(signal)), 0, num_workers=2))
    assert len(found) == len(batches)


@pytest.mark.parametrize("error", [RuntimeError("DataLoader is fine"), ValueError("DataLoader worker")])
def test_other_errors_stay_what_they_are(error: Exception):
    with pytest.raises(type(error)) as caught, dead_workers_named():
        raise error
    assert caught.value is error


def test_a_batch_survives_the_thread_that_pins_it(monkeypatch: pytest.MonkeyPatch):
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = collate([], [], [], 7, SIZE)
    found = pin_memory(batch)
    assert isinstance(found, Batch)
    assert len(pinned) == len(Batch._fields)
    assert found.pixel_values is batch.pixel_values


def test_the_index_counts_what_is_collated(tmp_path: Path):
    data = write(tmp_path)
    index = index_of(data, tmp_path)
    batches = dataset(data, tmp_path)
    for item in range(len(batches)):
        batch = batches[item]
        ids = batch.sample_ids.numpy()
        np.testing.assert_array_equal(np.diff(batch.cu_seqlens.numpy()), index.lengths[ids])
        assert len(batch.targets) == index.supervised[ids].sum()
        assert len(batch.pixel_values) == index.num_images[ids].sum()
    assert (index.truncated, index.unsupervised) == (0, 0)


def test_the_index_counts_no_token_that_nothing_predicts(tmp_path: Path):
    chat = ChatFormat.from_dict({"label": "bare", "turn": [{"text": "{answer}", "trained": True}]})
    texts = [sample for sample in write(tmp_path).samples if not sample.images]
    index = index_of(write(tmp_path), tmp_path, samples=texts, chat=chat)
    encoded = [chat.encode(sample, TOKENIZER, V, MAX_LENGTH) for sample in texts]
    assert index.supervised.sum() == len(collate(encoded, [], range(len(texts)), 0, SIZE).targets)


def test_the_index_is_kept_for_what_it_was_measured_on(tmp_path: Path):
    data = write(tmp_path)
    first = index_of(data, tmp_path)
    (kept,) = (tmp_path / "cache" / "lengths").iterdir()
    stamp = kept.stat().st_mtime_ns
    again = index_of(data, tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    for one, other in zip(vars(first).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: measured anew
    np.testing.assert_array_equal(index_of(data, tmp_path).lengths, first.lengths)
    for changes in ({"num_visual_tokens": 9}, {"max_length": 60}, {"key": "x"}):
        index_of(data, tmp_path, **changes)
    llama = {"chat": chat_format("llama_3_1"), "tokenizer": tokenizer_for("llama_3_1"), "max_length": 999}
    index_of(data, tmp_path, **llama)
    assert len(list((tmp_path / "cache" / "lengths").iterdir())) == 5


def test_the_index_is_the_same_from_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write(tmp_path)
    alone = index_of(data, tmp_path / "a")
    monkeypatch.setattr(index, "_PARALLEL_FROM", 1)
    monkeypatch.setattr(index, "_CHUNK", 5)
    together = index_of(data, tmp_path / "b", cache=tmp_path / "b")
    for one, other in zip(vars(alone).values(), vars(together).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(DataError, match="sample 0: record id 'r0': its visual tokens"):
        index_of(data, tmp_path / "c", cache=tmp_path / "c", max_length=10)


def test_cut_samples_are_counted(tmp_path: Path):
    data = write(tmp_path)
    whole = index_of(data, tmp_path)
    max_length = int(np.sort(whole.lengths)[7])
    cut = index_of(data, tmp_path, max_length=max_length)
    assert cut.truncated == (whole.lengths > max_length).sum()
    assert cut.unsupervised == (cut.supervised == 0).sum()
    np.testing.assert_array_equal(cut.lengths, np.minimum(whole.lengths, max_length))


def test_a_length_that_leaves_nothing_to_learn_or_cuts_images(tmp_path: Path):
    texts = [sample for sample in write(tmp_path).samples if not sample.images]
    with pytest.raises(DataError, match="None of the 7 samples has a supervised token within max_length=5"):
        index_of(write(tmp_path), tmp_path, samples=texts, max_length=5)
    with pytest.raises(DataError) as caught:
        index_of(write(tmp_path), tmp_path, max_length=10)
    assert "sample 0: record id 'r0': its visual tokens do not fit into max_length=10" in str(caught.value)
    assert "sample 4: record id 'r4'" in str(caught.value)
    assert not list((tmp_path / "cache" / "lengths").iterdir())
