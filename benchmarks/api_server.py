"""LMDeploy's ``api_server`` with a stand-in for generation, as a peer of our HTTP front end.

The application, its routes, models and the parser of answers are LMDeploy's. ``AsyncEngine`` neither
renders a prompt nor generates: it answers at once with the text that our fake engine answers with.

``python -m benchmarks.api_server FOLDER`` writes a text checkpoint into the folder, serves it with the
settings of a user who gives none, and prints its port.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

PIECES = ("This ", "is ", "the ", "fake ", "engine.")


class Idle:
    """What ``AsyncEngine`` needs of an engine that nobody asks."""

    def __init__(self, config: Any) -> None:
        self.engine_config = config

    def create_instance(self) -> object:
        return object()

    async def get_health_status(self) -> dict[str, Any]:
        return {"alive": True, "message": "", "schedule_metrics": self.get_schedule_metrics()}

    def get_schedule_metrics(self) -> Any:
        from lmdeploy.messages import ScheduleMetrics

        return ScheduleMetrics()

    def close(self) -> None:
        """Nothing is open."""


def stand_in() -> None:
    """Have every ``AsyncEngine`` of this process answer at once."""
    from lmdeploy.serve.core import AsyncEngine
    from lmdeploy.serve.core.async_engine import GenOut

    def build(self: Any, backend_config: Any, **_: Any) -> Idle:
        return Idle(backend_config)

    async def preprocess(self: Any, *_: Any, **__: Any) -> None:
        return None

    async def generate(self: Any, *_: Any, **__: Any) -> AsyncGenerator[GenOut]:
        for number, piece in enumerate(PIECES, 1):
            yield GenOut(piece, 4, number, token_ids=[number])
        yield GenOut("", 4, len(PIECES), "stop", token_ids=[])

    AsyncEngine._build_turbomind = build
    AsyncEngine.preprocess = preprocess
    AsyncEngine.generate = generate


def announce(port: int) -> None:
    """Print the port once the server listens."""
    while True:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    sys.stderr.flush()
    os.write(OUTPUT, f"{port}\n".encode())


def main() -> None:
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.serve.openai.api_server import serve

    from tests.host_runtime.checkpoints import write_text_checkpoint

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_text_checkpoint(Path(sys.argv[1]))
    stand_in()
    threading.Thread(target=announce, args=(port,), daemon=True).start()
    serve(
        sys.argv[1],
        model_name="fake",
        backend_config=TurbomindEngineConfig(max_batch_size=64),
        server_name="127.0.0.1",
        server_port=port,
    )


if __name__ == "__main__":
    OUTPUT = os.dup(1)
    os.dup2(2, 1)  # LMDeploy prints hints
    main()
