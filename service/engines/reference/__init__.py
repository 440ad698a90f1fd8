"""The reference engine: Qwen3-VL in plain torch, on a CPU or a GPU.

It is the executable specification for faster engines, and the engine for machines without a GPU.
Importing this package does not import torch; starting the engine does.
"""

from service.engines.kind import EngineKind
from service.engines.reference.engine import ReferenceEngine, build
from service.engines.reference.options import ReferenceSettings

__all__ = ["KIND", "ReferenceEngine"]

KIND = EngineKind("reference", ReferenceSettings, build)
