"""The gRPC health service.

The stock servicer writes to a watcher while it holds a lock. One watcher that does not read then
blocks all other watchers, the change of status and the shutdown of the server. The stock servicer
also lacks ``List``. In this servicer, a change wakes the watchers and waits for none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

MAX_WATCHERS = 1024
"""Maximum number of calls of Watch at the same time: they need no key and never end."""

Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # without types
    """Reports the status of services by name. Not thread-safe: belongs to one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._watchers = 0

    def set(self, service: str, status: int) -> None:
        """Set the status of a service and wake its watchers."""
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no service of this name")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> Any:
        found = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._statuses.items()
        }
        return health_pb2.HealthListResponse(statuses=found)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[Any]:
        if self._watchers >= MAX_WATCHERS:
            text = f"the server has {MAX_WATCHERS} watchers; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        told = None
        self._watchers += 1
        try:
            while True:
                changed = self._changed
                status = self._statuses.get(
                    request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
                if status != told:
                    told = status
                    yield health_pb2.HealthCheckResponse(status=status)
                else:
                    await changed.wait()
        finally:
            self._watchers -= 1
