"""The images that questions ask about, each content once, whatever task and row they come from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from morebench.data.aside import replace_file, replace_text
from morebench.data.findings import Kind, SampleError
from morebench.data.images import decode_image, open_image, read_image

Index = dict[str, dict[int, str]]  # place in a row (`image`, `image[2]`) -> row -> key


@dataclass(frozen=True)
class ImageStore:
    """`<root>/<first two letters>/<key>`, a key being the sha256 of the bytes; safe for many processes."""

    root: Path

    def add(self, content: bytes) -> str:
        """The key. Raises SampleError for what has no image's header, and keeps nothing of it."""
        open_image(content)
        key = hashlib.sha256(content).hexdigest()
        if not self.path(key).is_file():
            replace_file(self.path(key), lambda aside: aside.write_bytes(content))
        return key

    def path(self, key: str) -> Path:
        return self.root / key[:2] / key

    def index(self, content_hash: str) -> Index:
        """What is known of the rows of that content, as far as the images are still here."""
        file = self.index_file(content_hash)
        if not file.is_file():
            return {}
        stored = {path.name for path in self.root.glob("??/*")}
        return {
            place: {int(row): key for row, key in keys.items() if key in stored}
            for place, keys in json.loads(file.read_text()).items()
        }

    def remember(self, content_hash: str, index: Mapping[str, Mapping[int, str]]) -> None:
        replace_text(self.index_file(content_hash), json.dumps(index))

    def index_file(self, content_hash: str) -> Path:
        return self.root / "index" / f"{content_hash}.json"


def load_image_of(path: Path, key: str | None, where: str) -> Image.Image:
    """RGB. `key`: what the bytes must hash to. Raises SampleError that says `where` the image belongs."""
    try:
        content = read_image(path)
        if key is not None and hashlib.sha256(content).hexdigest() != key:
            raise SampleError(Kind.damaged, f"{path} has changed. Delete it: it is made again.")
        return decode_image(content)
    except SampleError as error:
        raise SampleError(error.kind, f"{where}: {error.reason}") from None
