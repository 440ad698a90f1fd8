"""``qwen3vl serve`` with a probe: what only the process itself can count, one JSON line a second.

``python -m benchmarks.soak.server FILE [arguments of serve]``. The command is the real one; the probe
runs on its event loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from service.cli import serving
from service.grpc_api.server import VisionServer

PROBE_S = 1.0


def counts(server: VisionServer) -> dict[str, float]:
    """Time, tasks of the event loop, and what calls hold."""
    budgets = server.runtime.budgets
    return {
        "time": time.time(),
        "tasks": len(asyncio.all_tasks()),
        "calls": server.lifecycle.calls_in_flight,
        "slots": budgets.admission.active,
        "queued": budgets.admission.waiting,
        "encoded_bytes": budgets.encoded.held,
    }


async def report(server: VisionServer, path: Path) -> None:
    """Append the counts to the file until cancelled."""
    with path.open("a", buffering=1) as file:
        while True:
            file.write(json.dumps(counts(server)) + "\n")
            await asyncio.sleep(PROBE_S)


def main() -> int:
    path, *arguments = sys.argv[1:]
    announce = serving._announce
    probes: list[asyncio.Task[None]] = []

    def announce_and_probe(server: VisionServer) -> None:
        announce(server)
        probes.append(asyncio.get_running_loop().create_task(report(server, Path(path))))

    serving._announce = announce_and_probe
    return serving.serve_command(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
