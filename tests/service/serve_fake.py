"""Runs a server on the fake engine in a process of its own; prints its port when it serves.

Arguments: seconds of grace, seconds before each piece of text, pieces of text.
"""

from __future__ import annotations

import asyncio
import sys

from service import logs
from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer, serve
from service.settings import Settings
from service.tasks.registry import load_registry


def announce(server: VisionServer) -> None:
    print(server.port, flush=True)


def main() -> None:
    grace_s, delay_s, pieces = (float(argument) for argument in sys.argv[1:])
    logs.configure()
    engine = FakeEngine("word " * int(pieces), token_delay_s=delay_s)
    settings = Settings(port=0, drain_grace_s=grace_s)
    asyncio.run(serve(settings, engine, load_registry(None), on_ready=announce))


if __name__ == "__main__":
    main()
