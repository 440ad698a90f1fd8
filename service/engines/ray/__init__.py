"""The Ray engine: replicas of another engine as a Ray Serve deployment, on this machine or on a
cluster.

This server keeps what callers rely on; Ray places, starts and restarts the replicas. Importing this
package does not import Ray; starting the engine does.
"""

from service.engines.ray.building import kind_over
from service.engines.ray.engine import RayEngine
from service.engines.ray.options import RaySettings

__all__ = ["RayEngine", "RaySettings", "kind_over"]
