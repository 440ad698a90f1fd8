"""Runs a server with gRPC and HTTP on the fake engine in a process of its own.

Prints the port of HTTP when it serves. Arguments: seconds of grace, seconds before each piece of text,
pieces of text.
"""

from __future__ import annotations

import asyncio
import sys

from service import logs
from service.engines.fake import FakeEngine
from service.grpc_api.server import GrpcFrontEnd
from service.http_api.server import HttpFrontEnd
from service.runtime import Runtime, serve
from service.settings import Settings
from service.tasks.registry import load_registry


async def main() -> None:
    grace_s, delay_s, pieces = (float(argument) for argument in sys.argv[1:])
    settings = Settings(port=0, http_port=0, drain_grace_s=grace_s)
    engine = FakeEngine("word " * int(pieces), token_delay_s=delay_s)
    runtime = Runtime(settings, [engine], load_registry(None))
    http = HttpFrontEnd(runtime)
    ready = lambda: print(http.port, flush=True)  # noqa: E731
    await serve(runtime, [GrpcFrontEnd(runtime), http], on_ready=ready)


if __name__ == "__main__":
    logs.configure()
    asyncio.run(main())
