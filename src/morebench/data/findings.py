"""What can be wrong, or odd, with a training sample: by its record and images alone, never by an LLM."""

from dataclasses import dataclass
from enum import Enum

from morebench.errors import DataError


class Kind(Enum):
    """The value is what a person reads."""

    # such a sample cannot be used as it is meant: it is quarantined, the same way for every cell
    malformed = "no record of the format"
    turns = "turns do not alternate between human and gpt"
    image_count = "another number of image tokens than of images"
    empty_answer = "empty answer"
    outside = "image path leads out of the image folder"
    missing = "image is missing"
    unreadable = "image file cannot be read"
    empty_file = "image file is empty"
    not_an_image = "file is no image of a known format"
    damaged = "image is damaged or cut off"
    too_large = "image has too many pixels"
    too_long = "image is a strip"
    crashed = "image ended the process that decoded it"
    # such a sample is used as the study used it: counted and shown
    duplicate_id = "id occurs more than once"
    wrong_extension = "file name says another format"
    animated = "animated image: its first frame is used"
    cmyk = "CMYK image: converted without its colour profile"
    deep = "more than 8 bits a channel: cut off or clipped to 8"
    blank = "image of one colour"

    @property
    def quarantines(self) -> bool:
        return self not in _KEPT


_KEPT = (
    Kind.duplicate_id,
    Kind.wrong_extension,
    Kind.animated,
    Kind.cmyk,
    Kind.deep,
    Kind.blank,
)


class SampleError(DataError):
    """Keeps one sample out; the rest of the data can be used."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(kind, reason)  # both, so that it can be pickled
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Finding:
    kind: Kind
    reason: str  # a sentence
    record: int  # number in the records file, from 0
    offset: int  # byte in the records file at which the record begins
    id: str | None = None  # None where the record has none; a very long one is shortened
    image: str | None = None  # as the record names it

    def __str__(self) -> str:
        named = "" if self.id is None else f" (id {self.id!r})"
        image = "" if self.image is None else f"image {printable(self.image)}: "
        return f"record {self.record}{named}: {image}{self.reason} (byte {self.offset})"


MAX_SHOWN = 300  # characters


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """What a file says, as any terminal can show it: no half characters, of bounded length."""
    shown = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return shown.encode(errors="backslashreplace").decode()
