"""``qwen3vl serve`` with a probe: what only the process itself can count, one JSON line a second.

``python -m benchmarks.soak.server FILE [arguments of serve]``. The command is the real one; the probe
runs on its event loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.cli import serving
from service.runtime import FrontEnd, Runtime

PROBE_S = 1.0


def counts(runtime: Runtime) -> dict[str, float]:
    """Time, tasks of the event loop, and what calls hold."""
    budgets = runtime.budgets
    return {
        "time": time.time(),
        "tasks": len(asyncio.all_tasks()),
        "calls": runtime.lifecycle.calls_in_flight,
        "slots": budgets.admission.active,
        "queued": budgets.admission.waiting,
        "encoded_bytes": budgets.encoded.held,
    }


async def report(runtime: Runtime, path: Path) -> None:
    """Append the counts to the file until cancelled."""
    with path.open("a", buffering=1) as file:
        while True:
            file.write(json.dumps(counts(runtime)) + "\n")
            await asyncio.sleep(PROBE_S)


def main() -> int:
    path, *arguments = sys.argv[1:]
    serve = serving.serve

    async def serve_with_probe(
        runtime: Runtime, front_ends: Sequence[FrontEnd], *, on_ready: Callable[[], None]
    ) -> None:
        probes: list[asyncio.Task[None]] = []

        def ready() -> None:
            on_ready()
            probes.append(asyncio.create_task(report(runtime, Path(path))))

        await serve(runtime, front_ends, on_ready=ready)

    serving.serve = serve_with_probe
    return serving.serve_command(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
