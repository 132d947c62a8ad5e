"""Which questions ride together: a partition that keeps groups whole and stays within its limits."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morebench.data.chat import Encoded
from morebench.evaluation.chunks import Group, Request, groups_of, most_positions, plan_chunks, prefix_length
from morebench.evaluation.items import StoredImage


def ask(images: str, length: int, opening: int = 7, max_new_tokens: int = 5) -> Request:
    """Two tokens, three visual ones per image, `length` more."""
    ids = [1, opening, *[0] * 3 * len(images), *range(10, 10 + length)]
    visual = np.zeros(len(ids), dtype=bool)
    visual[2 : 2 + 3 * len(images)] = True
    nothing: Any = None
    encoded = Encoded(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool), visual, False)
    return Request(encoded, tuple(StoredImage(key, key, nothing) for key in images), max_new_tokens)


REQUESTS = st.lists(
    st.builds(ask, st.sampled_from(["", "a", "b", "aa", "ab"]), st.integers(1, 9), st.sampled_from([7, 8])),
    max_size=30,
)


def test_a_group_shares_images_and_the_ids_before_them() -> None:
    requests = [
        ask("a", 3),
        ask("b", 3),
        ask("a", 5),
        ask("", 4),
        ask("", 4),
        ask("a", 3, opening=8),
        ask("ab", 3),
    ]
    assert groups_of(requests) == [
        Group((0, 2), 5),
        Group((1,), 5),
        Group((3,), 0),
        Group((4,), 0),
        Group((5,), 5),
        Group((6,), 8),
    ]


def test_a_prompt_that_ends_in_an_image_has_no_question_to_part_from() -> None:
    assert prefix_length(ask("a", 0)) == 0
    assert prefix_length(ask("a", 1)) == 5


@given(requests=REQUESTS, batch_size=st.integers(1, 12), max_positions=st.sampled_from([None, 1, 60, 200]))
def test_chunks_are_a_partition_within_their_limits(
    requests: list[Request], batch_size: int, max_positions: int | None
) -> None:
    chunks = plan_chunks(requests, batch_size, max_positions)
    assert sorted(place for chunk in chunks for place in chunk) == list(range(len(requests)))
    where = {place: number for number, chunk in enumerate(chunks) for place in chunk}
    for group in groups_of(requests):
        if len(group.rows) <= batch_size:
            assert len({where[place] for place in group.rows}) == 1
    longest = []
    for chunk in chunks:
        assert len(chunk) <= batch_size
        asked = [requests[place] for place in chunk]
        sizes = [most_positions(asked, group) for group in groups_of(asked)]
        longest.append(max(sizes))
        if max_positions is not None and len(sizes) > 1:
            assert len(sizes) * max(sizes) <= max_positions
    if all(len(group.rows) <= batch_size for group in groups_of(requests)):
        assert longest == sorted(longest, reverse=True)


def test_an_image_with_more_questions_than_a_chunk_holds_is_cut_evenly() -> None:
    chunks = plan_chunks([ask("a", 3)] * 9, 4)
    assert sorted(map(len, chunks)) == [3, 3, 3]


def test_chunks_are_filled() -> None:
    requests = [ask(key, 3) for key in "abcdef" for _ in range(2)]
    assert [len(chunk) for chunk in plan_chunks(requests, 4)] == [4, 4, 4]
    # 5 shared, twice 3 + 5 more
    assert [len(chunk) for chunk in plan_chunks(requests, 12, 3 * 21)] == [6, 6]
    assert [len(chunk) for chunk in plan_chunks(requests, 12, 3 * 21 - 1)] == [4, 4, 4]
