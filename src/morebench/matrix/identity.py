"""What of a config can change a number, and the short name of such content."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def identity(value: Any) -> Any:
    """JSON-able content of a config node without the fields marked `unidentified()`."""
    if is_dataclass(value):
        return {
            field.name: identity(getattr(value, field.name))
            for field in fields(value)
            if field.metadata.get("identity", True)
        }
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    return value


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
