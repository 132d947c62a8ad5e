"""Controls: the suite's questions about something else than their image. No torch."""

from PIL import Image, ImageStat

from morebench.errors import ConfigError
from morebench.evaluation.items import StoredImage

BLIND = "blind"
CONTROLS = (BLIND,)


def check_controls(controls: list[str]) -> None:
    """Raises ConfigError."""
    if unknown := sorted(set(controls) - set(CONTROLS)):
        raise ConfigError(
            f"stage.evaluate.controls: there is no {', '.join(unknown)}. There is: {', '.join(CONTROLS)}."
        )


def blind(image: StoredImage) -> StoredImage:
    """The image's mean colour, in its size."""

    def load() -> Image.Image:
        seen = image.load()
        return Image.new("RGB", seen.size, tuple(round(channel) for channel in ImageStat.Stat(seen).mean))

    return StoredImage(f"{BLIND} {image.key}", image.name, load)
