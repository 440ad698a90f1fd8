"""A front end without gRPC: over TCP, every line is a user text, its answer is a line of JSON.

As a program it serves the fake engine, prints its port, and at its end whether gRPC was imported.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from service.engines.fake import FakeEngine
from service.errors import ServiceError
from service.inference.calls import Call, InlineTask
from service.lifecycle import Phase
from service.runtime import Runtime, serve
from service.settings import Settings
from service.tasks.registry import load_registry
from service.types import Sampling


class LineFrontEnd:
    """Calls take the first engine; ``phases`` is what the runtime told."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._server: asyncio.Server | None = None
        self.phases: list[Phase] = []
        self.port = 0
        self.broken = asyncio.Event()

    def enter(self, phase: Phase) -> None:
        self.phases.append(phase)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def serve(self) -> None:
        await self.broken.wait()
        raise RuntimeError("the line front end broke")

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            call = asyncio.create_task(self._answer(line.decode().strip()))
            await asyncio.wait([call])
            drained = call.cancelled()
            found: dict[str, Any] = {"error": "ENGINE_DRAINING"} if drained else call.result()
            writer.write(json.dumps(found).encode() + b"\n")
        writer.close()

    async def _answer(self, text: str) -> dict[str, Any]:
        task = asyncio.current_task()
        assert task is not None
        try:
            self._runtime.lifecycle.enter(task)
            call = Call(InlineTask("", text, None), (), Sampling())
            answer = await self._runtime.inference_for().answer(call, None)
        except ServiceError as error:
            return {"error": error.reason}
        return {"text": answer.text, "model": answer.model}


async def ask(port: int, text: str) -> dict[str, Any]:
    """One line over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(text.encode() + b"\n")
        return dict(json.loads(await asyncio.wait_for(reader.readline(), 60)))
    finally:
        writer.close()


async def main() -> None:
    runtime = Runtime(Settings(), [FakeEngine("an answer")], load_registry(None))
    front_end = LineFrontEnd(runtime)
    ready = lambda: print(front_end.port, flush=True)  # noqa: E731
    await serve(runtime, [front_end], on_ready=ready)
    print("grpc" in sys.modules, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
