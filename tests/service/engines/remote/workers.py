"""A server of this project in a thread with an event loop of its own, for tests that have another loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.engines.fake import FakeEngine
from tests.service.http_api.harness import serving


@dataclass(frozen=True)
class Worker:
    """Its engine, and its URLs over both front ends."""

    engine: FakeEngine
    grpc: str
    http: str

    @property
    def idle(self) -> bool:
        return self.engine.active_requests == 0


@contextmanager
def worker(engine: FakeEngine) -> Iterator[Worker]:
    """Serves over gRPC and HTTP until the block ends."""
    started: list[Worker] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def serve() -> None:
        async with serving(engine) as server:
            grpc = f"grpc://127.0.0.1:{server.grpc.port}"
            started.append(Worker(engine, grpc, server.base_url))
            ready.set()
            await ending.wait()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, name="worker-of-a-test")
    thread.start()
    ready.wait(60)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(60)
