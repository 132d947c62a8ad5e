"""An answer does not depend on the batch it rode in, on any family; real classes, random weights, fp32."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from factories_evaluation import FAMILIES, byte_tokenizer, chat_format, questions, tiny_mllm
from factories_vision import random_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from morebench.data.chat import Encoded
from morebench.errors import NonFiniteError
from morebench.evaluation.generate import NEAR_TIE, Answer, generate, generation_attention, length_batches
from morebench.models.mllm import MLLM

MAX_NEW_TOKENS = 6
NUM_QUESTIONS = 14


@dataclass(frozen=True)
class Case:
    mllm: MLLM
    tokenizer: PreTrainedTokenizerFast
    ends: list[int]
    prompts: list[Encoded]
    visual: list[Tensor]

    def answer(self, chosen: Sequence[int], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Answer]:
        prompts, visual = [self.prompts[i] for i in chosen], [self.visual[i] for i in chosen]
        with generation_attention(self.mllm.llm):
            return generate(self.mllm, self.tokenizer, self.ends, prompts, visual, max_new_tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def make_case(family: str) -> Case:
    tokenizer = byte_tokenizer(family)
    mllm, chat = tiny_mllm(family, tokenizer), chat_format(family)
    texts = list(islice(questions(seed=1), NUM_QUESTIONS))
    prompts = [chat.encode_prompt(text, tokenizer, mllm.vision.num_visual_tokens) for text in texts]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        visual_IVD = mllm.encode_images(random_pixels(2 * NUM_QUESTIONS, 24, generator))
    visual = [visual_IVD[2 * i : 2 * i + text.count("<image>")].clone() for i, text in enumerate(texts)]
    # Every sixth id ends an answer, so that rows end at different steps.
    return Case(mllm, tokenizer, list(range(0, len(tokenizer), 6)), prompts, visual)


def one_at_a_time(case: Case, i: int) -> tuple[str, bool]:
    """The answer without a cache, a batch or a pad: the whole sequence anew for every token."""
    prompt, ids = case.prompts[i], []
    embeds_TD = case.mllm.embed(
        torch.from_numpy(prompt.input_ids).long(),
        torch.from_numpy(prompt.visual_mask).nonzero()[:, 0],
        case.visual[i],
    )
    for _ in range(MAX_NEW_TOKENS):
        output = case.mllm.llm.base_model(
            inputs_embeds=embeds_TD[None],
            position_ids=torch.arange(len(embeds_TD))[None],
            use_cache=False,
            cu_seqlens=[0, len(embeds_TD)],
        )
        best = int(case.mllm.logits(output.last_hidden_state[0, -1]).argmax())
        if best in case.ends:
            return case.tokenizer.decode(ids, skip_special_tokens=True), True
        ids.append(best)
        new_1D = case.mllm.llm.get_input_embeddings()(torch.tensor([best]))
        embeds_TD = torch.cat([embeds_TD, new_1D])
    return case.tokenizer.decode(ids, skip_special_tokens=True), False


def test_equals_generation_one_at_a_time_without_a_cache(case: Case) -> None:
    found = case.answer(range(NUM_QUESTIONS))
    assert sum(answer.near_ties for answer in found) == 0
    assert [(answer.text, answer.ended) for answer in found] == [
        one_at_a_time(case, i) for i in range(NUM_QUESTIONS)
    ]


def test_equals_generate_of_transformers(case: Case) -> None:
    for i in range(0, NUM_QUESTIONS, 3):
        prompt = case.prompts[i]
        embeds_TD = case.mllm.embed(
            torch.from_numpy(prompt.input_ids).long(),
            torch.from_numpy(prompt.visual_mask).nonzero()[:, 0],
            case.visual[i],
        )
        with generation_attention(case.mllm.llm):
            stock = case.mllm.llm.generate(
                inputs_embeds=embeds_TD[None],
                attention_mask=torch.ones(1, len(embeds_TD), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=case.ends,
                pad_token_id=0,
            )[0].tolist()
        ended = stock[-1] in case.ends
        text = case.tokenizer.decode(stock[:-1] if ended else stock, skip_special_tokens=True)
        [answer] = case.answer([i])
        assert (answer.text, answer.ended) == (text, ended)


def test_ids_that_the_tokenizer_lacks_are_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies are rounded up; what a row without a token answers has no text to stand for it."""
    decoded: list[list[int]] = []
    monkeypatch.setattr(
        case.tokenizer, "batch_decode", lambda ids, **_: decoded.extend(ids) or [""] * len(ids)
    )
    assert all(answer.unreadable_tokens == 0 for answer in case.answer(range(NUM_QUESTIONS)))
    ids = sorted(token for tokens in decoded for token in tokens)
    size = ids[len(ids) // 2]  # a tokenizer that ends right before an id that occurs
    monkeypatch.setattr(type(case.tokenizer), "__len__", lambda _: size)
    found = [answer.unreadable_tokens for answer in case.answer(range(NUM_QUESTIONS))]
    assert found == [sum(token >= size for token in tokens) for tokens in decoded[:NUM_QUESTIONS]]


def test_unreadable_ids_leave_the_rest_of_the_text() -> None:
    """What transformers' decoder does with them, and why they are counted."""
    tokenizer = byte_tokenizer("llama")
    assert tokenizer.batch_decode([[*tokenizer("ab")["input_ids"], len(tokenizer) + 3]]) == ["ab"]


def test_the_questions_tell_something(case: Case) -> None:
    found = case.answer(range(NUM_QUESTIONS))
    assert len({answer.text for answer in found}) >= NUM_QUESTIONS / 2
    assert len({answer.num_tokens for answer in found}) >= 3
    assert {answer.ended for answer in found} == {True, False}


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(NUM_QUESTIONS)), batch_size=st.integers(1, NUM_QUESTIONS))
def test_any_batch_size_and_order_give_the_same_answers(
    case: Case, order: list[int], batch_size: int
) -> None:
    expected = case.answer(range(NUM_QUESTIONS))
    for start in range(0, NUM_QUESTIONS, batch_size):
        chosen = order[start : start + batch_size]
        for i, answer in zip(chosen, case.answer(chosen), strict=True):
            if not answer.near_ties:
                assert answer == expected[i]


def test_answers_depend_on_the_image() -> None:
    case = make_case("gemma2")
    chosen = [i for i in range(NUM_QUESTIONS) if len(case.visual[i]) == 1]
    before = [answer.text for answer in case.answer(chosen)]
    for i in chosen:
        case.visual[i] = case.visual[i].flip(1)
    changed = [a != b.text for a, b in zip(before, case.answer(chosen), strict=True)]
    assert sum(changed) >= 3


def test_the_length_limit_cuts(case: Case) -> None:
    for answer in case.answer(range(NUM_QUESTIONS), max_new_tokens=1):
        assert answer.num_tokens == (0 if answer.ended else 1)


def test_near_ties_are_counted(case: Case) -> None:
    head = case.mllm.llm.get_output_embeddings()
    weight = head.weight.clone()
    try:
        head.weight.copy_(weight[:1].expand_as(weight))  # all logits equal
        assert all(answer.near_ties for answer in case.answer([0, 1]))
    finally:
        head.weight.copy_(weight)
    assert NEAR_TIE == 1e-4


def test_logits_that_are_no_numbers_are_an_error(case: Case) -> None:
    chosen = next(i for i in range(NUM_QUESTIONS) if len(case.visual[i]))
    broken = [torch.full_like(case.visual[chosen], float("nan"))]
    with generation_attention(case.mllm.llm), pytest.raises(NonFiniteError):
        generate(case.mllm, case.tokenizer, case.ends, [case.prompts[chosen]], broken, MAX_NEW_TOKENS)


def test_attention_of_training_is_put_back(case: Case) -> None:
    before = case.mllm.llm.config._attn_implementation
    with generation_attention(case.mllm.llm):
        assert case.mllm.llm.config._attn_implementation in ("eager", "sdpa")
    assert case.mllm.llm.config._attn_implementation == before


def test_batches_hold_questions_of_like_length_longest_first() -> None:
    assert length_batches([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert length_batches([], 4) == []
