"""What makes each LLM family itself, against transformers' own model and against hand-worked numbers."""

import pytest
import torch
from factories_models import LLM_SHAPES, VOCABULARY, WIDTH, packed, tiny_mllm
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from morebench.config.compose import compose_config, load_shape
from morebench.data.batch import Batch
from morebench.errors import ConfigError
from morebench.models.attention import VARLEN
from morebench.models.llm import llm_config
from morebench.models.mllm import MLLM
from morebench.models.rope import check_max_length, fixed_positions, rotation

LENGTHS = (12, 9, 20)
WITH_IMAGE = (True, False, True)


def stock_model(mllm: MLLM) -> PreTrainedModel:
    """transformers' own model and eager attention, with the same weights."""
    config = mllm.llm.config.__class__.from_dict(mllm.llm.config.to_dict())
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    stock.load_state_dict(mllm.llm.state_dict())
    return stock.eval()


def hidden_inputs(mllm: MLLM, batch: Batch) -> Tensor:
    """Projected features and rows of the embedding matrix, neither of them scaled."""
    features = mllm.vision(mllm.normalise(batch.pixel_values))
    raw_TD = mllm.llm.get_input_embeddings().weight[batch.input_ids]
    return raw_TD.index_copy(0, batch.visual_positions, mllm.projector(features).flatten(0, 1))


def packed_logits(mllm: MLLM, batch: Batch) -> Tensor:
    embeds_TD = mllm.embed(batch.input_ids, batch.visual_positions, mllm.encode_images(batch.pixel_values))
    hidden_TD = mllm.llm.base_model(
        inputs_embeds=embeds_TD[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens.tolist(),
    ).last_hidden_state[0]
    return mllm.logits(hidden_TD)


@pytest.mark.parametrize("family", LLM_SHAPES)
@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str) -> None:
    """Gemma's as up to transformers 4: everything that enters is multiplied by sqrt(hidden size)."""
    mllm, batch = tiny_mllm(family).eval(), packed(LENGTHS, WITH_IMAGE)
    ours = packed_logits(mllm, batch).split(LENGTHS)
    stock = stock_model(mllm)
    scale = WIDTH**0.5 if family == "gemma2" else 1.0
    inputs = (hidden_inputs(mllm, batch) * scale).split(LENGTHS)
    for logits_TZ, embeds_TD in zip(ours, inputs, strict=True):
        expected = stock(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits_TZ, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits_TZ.argmax(-1), expected.argmax(-1))


@torch.inference_mode()
def test_without_its_factor_gemma_is_another_model() -> None:
    mllm, batch = tiny_mllm("gemma2").eval(), packed(LENGTHS, WITH_IMAGE)
    before = packed_logits(mllm, batch)
    mllm.visual_scale = 1.0
    assert (packed_logits(mllm, batch) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "sliding_window", 64),
        ("gemma2", "query_pre_attn_scalar", 32),
        ("phi3_windowed", "sliding_window", 64),
        ("phi3", "partial_rotary_factor", 1.0),
        ("phi", "partial_rotary_factor", 1.0),
        ("phi4", "rope_scaling", None),
        ("llama31", "rope_scaling", None),
    ],
)
@torch.inference_mode()
def test_every_trait_of_a_family_moves_its_logits(
    family: str, field: str, value: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the comparison above would see it missing."""
    batch = packed(LENGTHS, WITH_IMAGE)
    before = packed_logits(tiny_mllm(family).eval(), batch)
    changed = {key: kept for key, kept in LLM_SHAPES[family].items() if key != field}
    if value is not None or field.endswith("softcapping"):
        changed[field] = value
    monkeypatch.setitem(LLM_SHAPES, family, changed)
    assert (packed_logits(tiny_mllm(family).eval(), batch) - before).abs().max() > 1e-2


def test_gemma_looks_through_its_window_on_every_other_layer() -> None:
    for stem in ("gemma2_2b", "gemma2_9b"):
        config = llm_config(load_shape(f"llm/{stem}.json"))
        assert config.layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"]
        assert config.layer_types.count("full_attention") == config.num_hidden_layers // 2


def on_meta(stem: str) -> PreTrainedModel:
    with torch.device("meta"):
        shape = load_shape(f"llm/{stem}.json") | {"num_hidden_layers": 1}
        return AutoModelForCausalLM.from_config(llm_config(shape), attn_implementation=VARLEN)


def frequencies(stem: str) -> Tensor:
    config = llm_config(load_shape(f"llm/{stem}.json") | {"num_hidden_layers": 1})
    rotary = type(on_meta(stem).base_model.rotary_emb)
    return rotary(config=config).inv_freq


def test_rotated_share_of_a_head() -> None:
    """Phi-4 rotates 96 of 128, Phi-2 32 of 80, the others all."""
    found = {
        stem: 2 * len(frequencies(stem)) for stem in ("phi4", "phi2", "llama31_8b", "gemma2_2b", "vicuna_7b")
    }
    assert found == {"phi4": 96, "phi2": 32, "llama31_8b": 128, "gemma2_2b": 256, "vicuna_7b": 128}


def test_llama_31_stretches_its_slow_frequencies() -> None:
    """Wavelengths under 8192 / 4 are kept, those over 8192 / 1 are eight times as long."""
    plain, stretched = frequencies("llama3_8b"), frequencies("llama31_8b")
    wavelengths = 2 * torch.pi / plain
    torch.testing.assert_close(stretched[wavelengths < 2048], plain[wavelengths < 2048])
    torch.testing.assert_close(stretched[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    assert between.any()
    assert ((plain / 8 < stretched) & (stretched < plain))[between].all()
    torch.testing.assert_close(frequencies("deepseek_r1_llama_8b"), stretched)


def test_phi_2_has_biases_and_parallel_blocks() -> None:
    llm = on_meta("phi2")
    names = {name for name, _ in llm.base_model.layers[0].named_parameters()}
    norms = {name.split(".")[0] for name in names if "norm" in name}
    assert norms == {"input_layernorm"}  # attention and MLP read the same normed input
    assert {name.removesuffix(".weight") + ".bias" for name in names if name.endswith(".weight")} <= names
    assert llm.get_output_embeddings().bias is not None


@pytest.mark.parametrize("family", ["gemma2", "phi4"])
def test_tied_embeddings_learn_as_one_matrix(family: str) -> None:
    """Its gradient is the sum of what an embedding and a head of their own would get."""
    batch = packed(LENGTHS, WITH_IMAGE)
    tied = tiny_mllm(family)
    tied(batch).backward()
    rows = tied.llm.get_input_embeddings().weight
    assert tied.llm.get_output_embeddings().weight is rows

    apart = tiny_mllm(family)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight.data.copy_(rows.data)
    apart.llm.set_output_embeddings(head)
    apart(batch).backward()
    one, other = apart.llm.get_input_embeddings().weight.grad, head.weight.grad
    assert rows.grad is not None
    assert one is not None
    assert other is not None
    assert min(one.norm(), other.norm()) > 1e-3
    torch.testing.assert_close(rows.grad, one + other, rtol=1e-4, atol=1e-5)


LIMIT = LLM_SHAPES["phi4"]["original_max_position_embeddings"]


@pytest.mark.parametrize(("longest", "harmless"), [(LIMIT, True), (LIMIT + 1, False)])
@torch.inference_mode()
def test_a_long_sample_would_turn_its_whole_pack(longest: int, harmless: bool) -> None:
    """Why `check_max_length` refuses it: the neighbours' factors would be the long ones."""
    mllm = tiny_mllm("phi4").eval()
    batch = packed((9, longest), (True, False))
    alone = batch._replace(
        input_ids=batch.input_ids[:9],
        position_ids=batch.position_ids[:9],
        cu_seqlens=batch.cu_seqlens[:2],
    )
    beside = packed_logits(mllm, batch)[:9]
    assert torch.allclose(packed_logits(mllm, alone), beside, atol=1e-5) == harmless


def test_the_limit_is_that_of_the_built_model() -> None:
    assert fixed_positions(llm_config(LLM_SHAPES["phi4"])) == LIMIT
    assert fixed_positions(llm_config(load_shape("llm/phi4.json"))) == 4096
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert fixed_positions(llm_config(LLM_SHAPES["llama"] | {"rope_scaling": dynamic})) == 128
    for stem in ("gemma2_2b", "llama31_8b", "llama3_8b", "vicuna_7b", "phi2"):
        assert fixed_positions(llm_config(load_shape(f"llm/{stem}.json"))) is None


def test_lengths_beyond_the_limit_are_refused() -> None:
    phi = compose_config(["llm=phi4"]).config.llm
    check_max_length(phi, 4096, "stage.finetune.max_length")
    with pytest.raises(ConfigError, match=r"stage\.finetune\.max_length=4097, but .*embeddings=4096"):
        check_max_length(phi, 4097, "stage.finetune.max_length")


def test_lengths_that_are_rotated_alike_have_one_number() -> None:
    longrope = llm_config(load_shape("llm/phi4.json"))
    assert [rotation(longrope, length) for length in (1, 4096, 4097, 9000)] == [0, 0, 1, 1]
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    growing = llm_config(LLM_SHAPES["llama"] | {"rope_scaling": dynamic})
    assert [rotation(growing, length) for length in (1, 128, 129, 130)] == [0, 0, 129, 130]
    assert rotation(llm_config(load_shape("llm/llama31_8b.json")), 100_000) == 0


def test_the_experiments_lengths_are_within_the_limit() -> None:
    for overrides in (["llm=phi4"], ["llm=phi_tiny", "recipe=digits"]):
        config = compose_config(overrides).config
        for recipe in (config.stage.pretrain, config.stage.finetune):
            check_max_length(config.llm, recipe.max_length, "max_length")
