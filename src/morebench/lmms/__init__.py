"""A finished run as a model of lmms-eval, and our suite's tasks for it (docs/lmms-eval.md).

`model` and `task` import lmms_eval and are imported by it; the other modules do without.
"""

from typing import Any


def manifest() -> Any:
    """The entry point that lmms-eval looks for (group `lmms_eval.models` in pyproject.toml)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="morebench", simple_class_path="morebench.lmms.model.Morebench")
