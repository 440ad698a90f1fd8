"""The engine on LMDeploy: TurboMind or LMDeploy's PyTorch engine, on NVIDIA GPUs.

The only package of the service that imports LMDeploy, and not before the engine starts.
"""

from service.engines.lmdeploy.engine import LMDeployEngine

__all__ = ["LMDeployEngine"]
