"""Content hashes of files, which are read once: size and mtime tell whether one has changed since."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from morebench.data.aside import replace_text


def file_hashes(root: Path, names: Iterable[str], cache: Path) -> dict[str, str]:
    """name below `root` -> sha256, in the order of `names`; remembered below `cache`. Raises OSError."""
    memory_file = cache / "hashes" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    memory = json.loads(memory_file.read_text()) if memory_file.is_file() else {}
    files: dict[str, list[int | str]] = {}
    for name in names:
        path = root / name
        stat = path.stat()
        known = memory.get(name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                known = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        files[name] = known
    if any(memory.get(name) != known for name, known in files.items()):
        replace_text(memory_file, json.dumps(memory | files))
    return {name: str(known[2]) for name, known in files.items()}
