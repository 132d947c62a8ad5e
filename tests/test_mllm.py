"""Invariants first: what a packed batch must equal, and what it must not see."""

import pytest
import torch
from factories_models import LLM_SHAPES, NUM_VISUAL_TOKENS, VOCABULARY, gradients, packed, tiny_mllm
from factories_vision import random_pixels
from torch import Tensor
from torch.nn.functional import cross_entropy

from morebench.data.batch import Batch
from morebench.models import mllm as mllm_module
from morebench.models.mllm import MLLM

FAMILIES = list(LLM_SHAPES)
LENGTHS = (12, 9, 20)


def padded_loss(mllm: MLLM, batch: Batch) -> Tensor:
    """The same samples through transformers' own model: eager attention, right padding, every logit."""
    mllm.llm.set_attn_implementation("eager")
    visual_IVD = mllm.encode_images(batch.pixel_values)
    embeds_TD = mllm.embed(batch.input_ids, batch.visual_positions, visual_IVD)
    lengths = batch.cu_seqlens.diff().tolist()
    labels_T = torch.full_like(batch.input_ids, -100)
    labels_T[batch.target_positions + 1] = batch.targets
    embeds_BTD = torch.nn.utils.rnn.pad_sequence(list(embeds_TD.split(lengths)), batch_first=True)
    labels_BT = torch.nn.utils.rnn.pad_sequence(list(labels_T.split(lengths)), True, -100)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones(length) for length in lengths], True).long()
    logits_BTZ = mllm.llm(inputs_embeds=embeds_BTD, attention_mask=mask_BT, use_cache=False).logits
    return cross_entropy(
        logits_BTZ[:, :-1].reshape(-1, VOCABULARY), labels_BT[:, 1:].reshape(-1), reduction="sum"
    )


def all_logits(mllm: MLLM, batch: Batch) -> Tensor:
    visual_IVD = mllm.encode_images(batch.pixel_values)
    hidden_TD = mllm.llm.base_model(
        inputs_embeds=mllm.embed(batch.input_ids, batch.visual_positions, visual_IVD)[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens.tolist(),
    ).last_hidden_state[0]
    return mllm.logits(hidden_TD)


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_in_loss_and_gradients(family: str) -> None:
    mllm, batch = tiny_mllm(family), packed(LENGTHS, (True, False, True))
    loss = mllm(batch)
    loss.backward()
    ours = gradients(mllm)
    mllm.zero_grad()
    stock = padded_loss(mllm, batch)
    stock.backward()
    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=0)
    assert_same_gradients(ours, gradients(mllm))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_changes_no_logit_of_its_neighbours(family: str) -> None:
    mllm, batch = tiny_mllm(family), packed(LENGTHS, (True, False, True))
    other_ids = batch.input_ids.clone()
    other_ids[: LENGTHS[0]] = (other_ids[: LENGTHS[0]] + 7) % VOCABULARY
    other_pixels = batch.pixel_values.clone()
    other_pixels[0] += 100
    before = all_logits(mllm, batch)
    after = all_logits(mllm, batch._replace(input_ids=other_ids, pixel_values=other_pixels))
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


def test_micro_batches_add_up_to_the_batch() -> None:
    mllm, batch = tiny_mllm("gemma2"), packed(LENGTHS, (True, True, True))
    mllm(batch).backward()
    whole = gradients(mllm)
    mllm.zero_grad()
    for n, (start, length) in enumerate(zip((0, 12, 21), LENGTHS, strict=True)):
        inside = (batch.target_positions >= start) & (batch.target_positions < start + length)
        visual = slice(n * NUM_VISUAL_TOKENS, (n + 1) * NUM_VISUAL_TOKENS)
        mllm(
            batch._replace(
                input_ids=batch.input_ids[start : start + length],
                position_ids=batch.position_ids[start : start + length],
                cu_seqlens=torch.tensor([0, length]),
                visual_positions=batch.visual_positions[visual] - start,
                pixel_values=batch.pixel_values[n : n + 1],
                target_positions=batch.target_positions[inside] - start,
                targets=batch.targets[inside],
            )
        ).backward()
    assert_same_gradients(whole, gradients(mllm))


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, batch = tiny_mllm("gemma2"), packed(LENGTHS, (True, False, True))
    loss = mllm(batch)
    loss.backward()
    whole = gradients(mllm)
    mllm.zero_grad()
    monkeypatch.setattr(mllm_module, "_LOGITS_PER_CHUNK", 3 * VOCABULARY)
    chunked = mllm(batch)
    chunked.backward()
    torch.testing.assert_close(loss, chunked, rtol=1e-6, atol=0)
    assert_same_gradients(whole, gradients(mllm))


@pytest.mark.parametrize("llm_is_trained", [True, False])
@pytest.mark.parametrize("kind", ["text_only", "unsupervised", "empty"])
def test_every_trained_parameter_gets_a_gradient(kind: str, llm_is_trained: bool) -> None:
    mllm, batch = tiny_mllm("gemma2"), packed(LENGTHS, (True, False, True))
    mllm.llm.requires_grad_(llm_is_trained)
    none = torch.zeros(0, dtype=torch.int64)
    text_only = packed(LENGTHS, (False, False, False))
    batch = {
        "text_only": text_only,
        "unsupervised": batch._replace(target_positions=none, targets=none),
        "empty": Batch(
            none, none, torch.zeros(1), none, batch.pixel_values[:0], *[none] * 4, none.sum(), none
        ),
    }[kind]
    loss = mllm(batch)
    loss.backward()
    found = gradients(mllm)
    assert found.keys() == {name for name, value in mllm.named_parameters() if value.requires_grad}
    assert all(found[name].count_nonzero() == 0 for name in found if name.startswith("projector"))
    if kind == "text_only":
        assert loss.item() > 0
    else:
        assert loss.item() == 0
        assert all(gradient.count_nonzero() == 0 for gradient in found.values())


def test_text_only_batches_do_not_touch_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = tiny_mllm("llama")
    monkeypatch.setattr(type(mllm.vision), "forward", lambda *_: pytest.fail("the encoder ran"))
    mllm(packed(LENGTHS, (False, False, False)))


def test_gemma_scales_visual_tokens_as_it_scales_its_own() -> None:
    """Feeding a visual token that equals a raw embedding row must equal feeding that token."""
    mllm = tiny_mllm("gemma2")
    rows_1VD = mllm.llm.get_input_embeddings().weight[None, 5 : 5 + NUM_VISUAL_TOKENS]
    mllm.projector = torch.nn.Flatten(2)  # type: ignore[assignment]
    mllm.projector.register_parameter("anchor", torch.nn.Parameter(torch.zeros(1)))
    mllm.vision = type("Rows", (torch.nn.Linear,), {"forward": lambda self, pixels: rows_1VD})(1, 1)
    visual_IVD = mllm.encode_images(random_pixels(1, 16))
    positions = torch.arange(NUM_VISUAL_TOKENS)
    spliced = mllm.embed(torch.zeros(NUM_VISUAL_TOKENS, dtype=torch.int64), positions, visual_IVD)
    torch.testing.assert_close(spliced, mllm.llm.get_input_embeddings()(positions + 5))


def test_reserved_positions_must_equal_visual_tokens() -> None:
    mllm, batch = tiny_mllm("llama"), packed(LENGTHS, (True, False, True))
    with pytest.raises(ValueError, match=r"7 positions .* 8 came"):
        mllm(batch._replace(visual_positions=batch.visual_positions[1:]))


def test_training_mode_leaves_the_encoder_alone() -> None:
    mllm = tiny_mllm("llama").train()
    assert mllm.llm.training
    assert not mllm.get_submodule("vision").training
