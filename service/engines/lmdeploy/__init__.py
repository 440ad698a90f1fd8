"""The engine on LMDeploy: TurboMind or LMDeploy's PyTorch engine, on NVIDIA GPUs.

Only this package of the service imports LMDeploy, and only when the engine starts.
"""

from service.engines.kind import EngineKind
from service.engines.lmdeploy.engine import LMDeployEngine, build
from service.engines.lmdeploy.options import LMDeploySettings

__all__ = ["KIND", "LMDeployEngine"]

KIND = EngineKind("lmdeploy", LMDeploySettings, build)
