"""What a control shows in place of an image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from morebench.errors import ConfigError, DataError
from morebench.evaluation.controls import blind, check_controls, shown, shuffled
from morebench.evaluation.items import StoredImage


def stored(key: object) -> StoredImage:
    return StoredImage(f"key {key}", f"{key}.png", lambda: Image.new("RGB", (1, 1)))


def keys(images: object) -> list[tuple[str, ...]]:
    return [tuple(image.key for image in own) for own in images]  # type: ignore[attr-defined]


# Items have up to three images of many, or none.
ITEMS = st.lists(st.lists(st.integers(0, 30), max_size=3, unique=True), min_size=1, max_size=60)


@given(ITEMS)
def test_no_item_keeps_an_image_and_every_image_is_shown_in_place_of_one(items: list[list[int]]) -> None:
    images = [tuple(stored(number) for number in own) for own in items]
    before = keys(images)
    try:
        after = keys(shuffled("toy", images))
    except DataError:
        assert len({number for own in items for number in own}) < 12, "there was room"
        return
    assert [len(own) for own in after] == [len(own) for own in before]
    assert not any(set(own) & set(others) for own, others in zip(before, after, strict=True))
    place = {(old, new) for o, n in zip(before, after, strict=True) for old, new in zip(o, n, strict=True)}
    assert len({old for old, _ in place}) == len(place) == len({new for _, new in place})
    assert {old for old, _ in place} == {new for _, new in place}
    assert keys(shuffled("toy", images)) == after


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40))
def test_any_two_different_images_are_enough_where_an_item_has_one(numbers: list[int]) -> None:
    images = [(stored(number),) for number in numbers]
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match=r"image of toy, which has 1 different ones over \d+ items"):
            shuffled("toy", images)
        return
    assert all(a != b for a, b in zip(keys(images), keys(shuffled("toy", images)), strict=True))


def test_another_task_is_shuffled_otherwise() -> None:
    images = [(stored(number),) for number in range(20)]
    assert keys(shuffled("a", images)) != keys(shuffled("b", images))
    assert shown(None, "a", images) is images


def test_blind_shows_the_mean_colour_in_the_same_size() -> None:
    image = Image.new("RGB", (6, 2), (0, 0, 0))
    image.paste((90, 30, 7), (0, 0, 2, 2))
    (own,) = shown("blind", "toy", [(StoredImage("a", "a.png", lambda: image),)])
    assert own[0].key == blind(StoredImage("a", "b.png", lambda: image)).key != "a"
    assert own[0].load().size == image.size
    assert own[0].load().getcolors() == [(12, (30, 10, 2))]


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (["blnd", "x"], r"there is no blnd, x\. There is: blind, shuffled\."),
        (["blind", "blind"], "blind stands there twice"),
    ],
)
def test_unknown_controls_are_refused(controls: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_controls(controls)
