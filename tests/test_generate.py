"""An answer does not depend on what was answered beside it, on any family; real classes, random weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from factories_evaluation import FAMILIES, byte_tokenizer, chat_format, tiny_mllm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.image_processor import ImageProcessor
from morebench.errors import NonFiniteError
from morebench.evaluation import cached_attention, decoding
from morebench.evaluation.chunks import groups_of, plan_chunks, prefix_length
from morebench.evaluation.generate import (
    NEAR_TIE,
    Answer,
    Generator,
    Request,
    count_flips,
    generation_attention,
)
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import LoadedModel
from morebench.models.rope import fixed_positions, forget_rotation

NUM_QUESTIONS = 24
# Rotated otherwise beyond a length that some prompts have, that some answers cross and some never reach.
LIMITS = {"longrope": 60, "dynamic": 45}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 6.0]}
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"sliding_window": 12},  # without a soft-cap
    "longrope": {"rope_scaling": LONGROPE, "original_max_position_embeddings": LIMITS["longrope"]},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    | {"max_position_embeddings": LIMITS["dynamic"]},
}
LAYOUTS = ["<image>{}", "<image>{}", "<image><image>{}", "see <image> and <image>: {}", "{}"]


class Asked(LoadedModel):
    """Every sixth id ends an answer, so that rows end at different steps."""

    def end_token_ids(self) -> list[int]:
        return list(range(3, len(self.tokenizer), 6))


@dataclass(frozen=True)
class Case:
    model: Asked
    requests: list[Request]
    expected: list[tuple[str, bool]]  # text, ended

    def answer(self, chosen: Sequence[int]) -> list[Answer]:
        return Generator(self.model).answer([self.requests[i] for i in chosen])


@pytest.fixture(scope="module", params=[*FAMILIES, "longrope"])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module")
def llama() -> Case:
    """For what does not depend on the family."""
    return make_case("llama")


def make_model(kind: str) -> Asked:
    family = {"longrope": "phi3", "dynamic": "gemma2"}.get(kind, kind)
    tokenizer = byte_tokenizer(family)
    mllm = tiny_mllm(family, tokenizer, **CHANGES.get(kind, {}))
    processing = ImageProcessing(
        resize=Resize.squash,
        resize_to=24,
        interpolation=Interpolation.bilinear,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    processor = ImageProcessor(processing, 24, AspectRatio.square)
    nothing: Any = None
    return Asked(mllm, tokenizer, chat_format(family), processor, 8, nothing)


@cache
def make_case(kind: str) -> Case:
    model = make_model(kind)
    requests = make_requests(model)
    return Case(model, requests, [one_at_a_time(model, request) for request in requests])


def make_requests(model: Asked) -> list[Request]:
    generator = np.random.default_rng(1)
    images = [noise(n) for n in range(3)]
    requests = []
    for _ in range(NUM_QUESTIONS):
        text = bytes(generator.integers(97, 123, generator.integers(1, 25), dtype=np.uint8)).decode()
        layout = generator.choice(LAYOUTS)
        shown = tuple(images[generator.integers(3)] for _ in range(layout.count("<image>")))
        limit = int(generator.integers(1, 12))
        requests.append(Request(model.prompt(layout.format(text)), shown, limit))
    return requests


def noise(number: int) -> StoredImage:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return StoredImage(f"noise {number}", f"{number}.png", lambda: Image.fromarray(pixels))


@torch.no_grad()
def one_at_a_time(model: Asked, request: Request) -> tuple[str, bool]:
    """The answer without a cache, a batch or a pad: the whole sequence anew for every token."""
    mllm, ids = model.mllm, []
    embeds_TD = mllm.embed(
        torch.from_numpy(request.prompt.input_ids).long(),
        torch.from_numpy(request.prompt.visual_mask).nonzero()[:, 0],
        model.encode(request.images),
    )
    forget_rotation(mllm.llm)
    for _ in range(request.max_new_tokens):
        output = mllm.llm.base_model(
            inputs_embeds=embeds_TD[None],
            position_ids=torch.arange(len(embeds_TD))[None],
            use_cache=False,
            cu_seqlens=[0, len(embeds_TD)],
        )
        best = int(mllm.logits(output.last_hidden_state[0, -1]).argmax())
        if best in model.end_token_ids():
            return model.tokenizer.decode(ids, skip_special_tokens=True), True
        ids.append(best)
        embeds_TD = torch.cat([embeds_TD, mllm.llm.get_input_embeddings()(torch.tensor([best]))])
    return model.tokenizer.decode(ids, skip_special_tokens=True), False


def test_equals_generation_one_at_a_time_without_a_cache(case: Case) -> None:
    found = case.answer(range(len(case.requests)))
    assert sum(answer.near_ties for answer in found) == 0
    assert [(answer.text, answer.ended) for answer in found] == case.expected


@settings(max_examples=4, deadline=None)
@given(
    order=st.permutations(range(NUM_QUESTIONS)),
    batch_size=st.integers(1, NUM_QUESTIONS),
    max_positions=st.sampled_from([None, 90, 300]),
    line=st.sampled_from([1, 40]),
    room=st.integers(1, 3),
)
def test_any_order_and_chunks_give_the_same_answers(
    case: Case, order: list[int], batch_size: int, max_positions: int | None, line: int, room: int
) -> None:
    requests = [case.requests[i] for i in order]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoding, "_TOKENS_PER_PASS", 100)
        patched.setattr(decoding, "_FIRST_ROOM", room)
        patched.setattr(cached_attention, "_TOKENS_OF_A_LINE", line)
        for chunk in plan_chunks(requests, batch_size, max_positions):
            found = case.answer([order[place] for place in chunk])
            assert [(a.text, a.ended) for a in found] == [case.expected[order[place]] for place in chunk]


def test_frequencies_that_grow_with_the_length_do_so() -> None:
    case = make_case("dynamic")
    found = Generator(case.model).answer(case.requests)
    assert [(answer.text, answer.ended) for answer in found] == case.expected


def test_the_questions_tell_something(case: Case) -> None:
    texts, ended = zip(*case.expected, strict=True)
    assert len(set(texts)) >= NUM_QUESTIONS / 2
    assert set(ended) == {True, False}
    assert len({len(text) for text in texts}) >= 3
    groups = groups_of(case.requests)
    assert max(len(group.rows) for group in groups) >= 3
    assert len({group.prefix_length for group in groups}) >= 4
    several = [group for group in groups if len(group.rows) > 1]
    assert {len(case.requests[group.rows[0]].images) for group in several} == {1, 2}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_lengths_on_both_sides_of_the_limit_are_asked(kind: str) -> None:
    model, requests, limit = make_case(kind).model, make_case(kind).requests, LIMITS[kind]
    assert fixed_positions(model.mllm.llm.config) == limit
    spans = [
        (prefix_length(one), len(one.prompt.input_ids), len(one.prompt.input_ids) + one.max_new_tokens - 1)
        for one in requests
    ]
    assert sum(last <= limit for _, _, last in spans) >= 3
    assert sum(length <= limit < last for _, length, last in spans) >= 3
    assert sum(0 < prefix <= limit < length for prefix, length, _ in spans) >= 3
    if kind == "longrope":  # with the other, no length beyond is rotated like another
        assert sum(prefix > limit for prefix, _, _ in spans) >= 3


def test_equals_generate_of_transformers(case: Case) -> None:
    llm = case.model.mllm.llm
    if fixed_positions(llm.config) is not None:
        return  # its generate goes on with keys that were rotated otherwise
    for i in range(0, NUM_QUESTIONS, 5):
        request = case.requests[i]
        embeds_TD = case.model.mllm.embed(
            torch.from_numpy(request.prompt.input_ids).long(),
            torch.from_numpy(request.prompt.visual_mask).nonzero()[:, 0],
            case.model.encode(request.images),
        )
        with generation_attention(llm):
            stock = llm.generate(
                inputs_embeds=embeds_TD[None],
                attention_mask=torch.ones(1, len(embeds_TD), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=request.max_new_tokens,
                eos_token_id=case.model.end_token_ids(),
                pad_token_id=0,
            )[0].tolist()
        ended = stock[-1] in case.model.end_token_ids()
        text = case.model.tokenizer.decode(stock[:-1] if ended else stock, skip_special_tokens=True)
        assert (text, ended) == case.expected[i]


def test_a_stream_is_the_answer_in_whole_characters(llama: Case) -> None:
    for i in range(0, NUM_QUESTIONS, 4):
        pieces = list(Generator(llama.model).stream(llama.requests[i]))
        assert "".join(pieces) == llama.expected[i][0]
        # a byte is no character: what stays incomplete to the end comes last
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1])


def test_ids_that_the_tokenizer_lacks_are_counted(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies are rounded up; what a row without a token answers has no text to stand for it."""
    decoded: list[list[int]] = []
    monkeypatch.setattr(
        llama.model.tokenizer, "batch_decode", lambda ids, **_: decoded.extend(ids) or [""] * len(ids)
    )
    assert all(answer.unreadable_tokens == 0 for answer in llama.answer(range(NUM_QUESTIONS)))
    ids = sorted(token for tokens in decoded for token in tokens)
    ends = llama.model.end_token_ids()
    size = ids[len(ids) // 2]  # a tokenizer that ends right before an id that occurs
    monkeypatch.setattr(Asked, "end_token_ids", lambda _: ends)
    monkeypatch.setattr(type(llama.model.tokenizer), "__len__", lambda _: size)
    found = [answer.unreadable_tokens for answer in llama.answer(range(NUM_QUESTIONS))]
    assert found == [sum(token >= size for token in tokens) for tokens in decoded[:NUM_QUESTIONS]]


def test_unreadable_ids_leave_the_rest_of_the_text() -> None:
    """What transformers' decoder does with them, and why they are counted."""
    tokenizer = byte_tokenizer("llama")
    assert tokenizer.batch_decode([[*tokenizer("ab")["input_ids"], len(tokenizer) + 3]]) == ["ab"]


def test_answers_depend_on_the_image(case: Case) -> None:
    chosen = [request for request in case.requests if request.images]
    other = [replace(request, images=(noise(9),) * len(request.images)) for request in chosen]
    before, after = (Generator(case.model).answer(asked) for asked in (chosen, other))
    assert sum(a.text != b.text for a, b in zip(before, after, strict=True)) >= 3


def test_an_image_is_read_once_a_chunk(llama: Case) -> None:
    read = []

    def load() -> Image.Image:
        read.append(1)
        return noise(0).load()

    asked = [replace(one, images=(StoredImage("one", "", load),)) for one in llama.requests[:3]]
    prompts = [llama.model.prompt(f"<image>{text}") for text in ("a", "b", "a")]
    Generator(llama.model).answer([replace(a, prompt=p) for a, p in zip(asked, prompts, strict=True)])
    assert read == [1]


def test_near_ties_are_counted(llama: Case) -> None:
    head = llama.model.mllm.llm.get_output_embeddings()
    weight = head.weight.clone()
    try:
        head.weight.copy_(weight[:1].expand_as(weight))  # all logits equal
        assert all(answer.near_ties for answer in llama.answer([0, 1]))
    finally:
        head.weight.copy_(weight)
    assert NEAR_TIE == 1e-4


def test_logits_that_are_no_numbers_are_an_error(llama: Case) -> None:
    head = llama.model.mllm.llm.get_output_embeddings()
    weight = head.weight.clone()
    try:
        head.weight[-1] = float("-inf")
        with pytest.raises(NonFiniteError):
            llama.answer([0, 1])
    finally:
        head.weight.copy_(weight)


def test_the_callers_attention_is_put_back(case: Case) -> None:
    config = case.model.mllm.llm.config
    before = config._attn_implementation
    with generation_attention(case.model.mllm.llm):
        found = case.answer([0])
        assert config._attn_implementation in ("eager", "sdpa")
    assert config._attn_implementation == before
    assert [(answer.text, answer.ended) for answer in found] == case.expected[:1]


def test_flips_are_answers_that_differ_alone(llama: Case) -> None:
    chosen = range(0, NUM_QUESTIONS, 4)
    requests, texts = [llama.requests[i] for i in chosen], [llama.expected[i][0] for i in chosen]
    assert count_flips(Generator(llama.model), requests, texts) == 0
    assert count_flips(Generator(llama.model), requests, [f"{texts[0]}!", *texts[1:]]) == 1


def test_a_chunk_that_fills_the_memory_is_halved(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Generator._answer

    def small(self: Generator, requests: Sequence[Request], share: bool) -> list[Answer]:
        if len(requests) > 3:
            raise torch.OutOfMemoryError
        return real(self, requests, share)

    monkeypatch.setattr(Generator, "_answer", small)
    generator = Generator(llama.model)
    found = generator.answer(llama.requests[:8])
    assert [(answer.text, answer.ended) for answer in found] == llama.expected[:8]
    assert generator.out_of_memory == 3
    monkeypatch.setattr(Generator, "_answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        generator.answer(llama.requests[:2])


def test_the_cache_of_a_position_is_its_keys_and_values(llama: Case) -> None:
    # 4 layers x 2 heads x 8 values x 4 bytes, keys and values
    assert llama.model.cache_positions(1 / 1024) == 2**20 // 512
    assert llama.model.cache_positions(None) == 2 * 2**30 // 512
