"""The engine on LMDeploy: TurboMind or LMDeploy's PyTorch engine, on NVIDIA GPUs.

The only package of the service that imports LMDeploy, and not before the engine starts.
"""

from service.engines.kind import EngineKind
from service.engines.lmdeploy.engine import LMDeployEngine, build
from service.engines.lmdeploy.options import LMDeploySettings

__all__ = ["KIND", "LMDeployEngine"]

KIND = EngineKind("lmdeploy", LMDeploySettings, build)
