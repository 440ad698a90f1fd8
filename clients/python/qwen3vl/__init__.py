"""A client of the qwen3vl server: structured vision inference with Qwen3-VL over gRPC.

`Client` is blocking, `AsyncClient` is for asyncio; both raise `CallError`. Requests and responses
are the messages of ``qwen3vl.v1.vision_pb2``.
"""

from qwen3vl.client import AsyncClient, CallError, Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "CallError", "Client"]
