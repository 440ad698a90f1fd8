"""What the extension may touch in LMDeploy, as comparable text; for code in a child."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from lmdeploy_ext.patch import Entry
from lmdeploy_ext.patches import PATCHES


def listing() -> dict[str, Any]:
    """Everything that the records touch, and the registries whole, as text."""
    from lmdeploy.turbomind.models.base import INPUT_MODELS
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS
    from lmdeploy.vl.model.builder import VISION_MODELS

    found: dict[str, Any] = {
        "archs": list(SUPPORTED_ARCHS.items()),
        "models": [(name, repr(kind)) for name, kind in INPUT_MODELS.module_dict.items()],
        "vision": [(name, repr(kind)) for name, kind in VISION_MODELS.module_dict.items()],
    }
    for record in PATCHES:
        module, _, path = record.target.partition(":")
        *parents, name = path.split(".")
        owner: Any = import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        attribute = inspect.getattr_static(owner, name)
        value = "" if isinstance(record, Entry) else id(attribute)
        found[record.target] = [name in vars(owner), list(vars(owner)), value]
    return found


def unordered(found: dict[str, Any]) -> dict[str, Any]:
    """Without the order of attributes, which changes when one is taken away and put back."""
    targets = {key: value for key, value in found.items() if ":" in key}
    return {key: [own, sorted(names), value] for key, (own, names, value) in targets.items()}
