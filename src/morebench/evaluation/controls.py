"""Controls: the suite's questions about something else than their image. No torch."""

import random
from collections.abc import Sequence

from PIL import Image, ImageStat

from morebench.errors import ConfigError, DataError
from morebench.evaluation.items import StoredImage

BLIND, SHUFFLED = "blind", "shuffled"
CONTROLS = (BLIND, SHUFFLED)

_ATTEMPTS = 100

Images = Sequence[tuple[StoredImage, ...]]


def check_controls(controls: Sequence[str]) -> None:
    """Raises ConfigError."""
    unknown = sorted(set(controls) - set(CONTROLS))
    twice = sorted({control for control in controls if controls.count(control) > 1})
    if unknown or twice:
        found = f"there is no {', '.join(unknown)}" if unknown else f"{', '.join(twice)} stands there twice"
        raise ConfigError(f"stage.evaluate.controls: {found}. There is: {', '.join(CONTROLS)}.")


def shown(control: str | None, task: str, images: Images) -> Images:
    """What each item of a task is asked about. Raises DataError where that cannot be another image."""
    if control == BLIND:
        return [tuple(blind(image) for image in own) for own in images]
    return shuffled(task, images) if control == SHUFFLED else images


def blind(image: StoredImage) -> StoredImage:
    """The image's mean colour, in its size."""

    def load() -> Image.Image:
        seen = image.load()
        return Image.new("RGB", seen.size, tuple(round(channel) for channel in ImageStat.Stat(seen).mean))

    return StoredImage(f"{BLIND} {image.key}", image.name, load)


def shuffled(task: str, images: Images) -> Images:
    """Another image of the task in place of each: none that the same item has, or an item beside it had.

    The images change places, so each is shown in place of exactly one other, and questions that shared an
    image share one again. A function of the task's name and of which images lie together.
    """
    by_key = {image.key: image for own in images for image in own}
    together = {key: {key} for key in by_key}
    for own in images:
        for image in own:
            together[image.key].update(other.key for other in own)
    keys = sorted(by_key)
    generator = random.Random(f"{SHUFFLED} {task}")
    for _ in range(_ATTEMPTS):
        if (others := _deranged(keys, together, generator)) is not None:
            place = dict(zip(keys, others, strict=True))
            return [tuple(by_key[place[image.key]] for image in own) for own in images]
    raise DataError(
        f"stage.evaluate.controls: {SHUFFLED} needs another image for every image of {task}, which has "
        f"{len(keys)} different ones over {len(images)} items. Leave the control out, or the task."
    )


def _deranged(
    keys: Sequence[str], together: dict[str, set[str]], generator: random.Random
) -> list[str] | None:
    """The keys in another order, none at the place of one it lies `together` with; None: none was found."""
    if len(keys) < 2:
        return None
    others = list(keys)
    generator.shuffle(others)
    for at, key in enumerate(keys):
        if others[at] not in together[key]:
            continue
        for swap in generator.sample(range(len(keys)), len(keys)):
            if others[swap] not in together[key] and others[at] not in together[keys[swap]]:
                others[at], others[swap] = others[swap], others[at]
                break
        else:
            return None
    return others
