"""Qwen3-VL's vision tower as a separate encoder, with its image pre-processing.

Names are imported on first use, so pre-processing alone does not import timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy_ext.encoder.config import VisionConfig
    from lmdeploy_ext.encoder.model import VisionEncoder, VisionFeatures
    from lmdeploy_ext.encoder.preprocess import (
        ImageProcessorConfig,
        normalise,
        preprocess,
    )
    from lmdeploy_ext.encoder.sizes import smart_resize

__all__ = [
    "ImageProcessorConfig",
    "VisionConfig",
    "VisionEncoder",
    "VisionFeatures",
    "normalise",
    "preprocess",
    "smart_resize",
]

_HOME = {
    "VisionConfig": "config",
    "VisionEncoder": "model",
    "VisionFeatures": "model",
    "smart_resize": "sizes",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, 'preprocess')}")
    return getattr(module, name)
