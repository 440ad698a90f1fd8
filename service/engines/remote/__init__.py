"""The remote engine: the model runs on another server, with OpenAI's API or that of this project.

Servers drop schemas, cut answers and mix channels without a word; here an answer is complete and
valid, or an error. Importing this package imports no HTTP client.
"""

from service.engines.kind import EngineKind
from service.engines.remote.building import build
from service.engines.remote.engine import RemoteEngine
from service.engines.remote.options import RemoteSettings

__all__ = ["KIND", "RemoteEngine"]

KIND = EngineKind("remote", RemoteSettings, several=build)
