"""What the metrics of calls cost: the latency of text calls with and without them.

One server on the fake engine and one caller in one process. Counting is switched on and off every
few calls, so that both halves see the same machine, and the other load on it.

``python -m benchmarks.call_metrics`` from the repository root.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import statistics
import time
from typing import Any

import grpc
import numpy as np

from benchmarks.common import environment, markdown, write_results
from benchmarks.server_overhead import METHOD, TEXT, request
from service import metrics
from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.observation import CallRecord
from service.settings import Settings
from service.tasks.registry import load_registry

SLICE = 40
"""Calls between two switches."""
CALLERS_AROUND_PROBES = 8
TARGET = 0.08


def count_nothing(record: CallRecord) -> None:
    """Stands in for ``metrics.count``."""


async def latencies_s(server: VisionServer, call: Any, slices: int) -> dict[bool, list[float]]:
    """Counting on, off -> latencies of all calls."""
    listeners = server.runtime.observation.listeners
    place = listeners.index(metrics.count)
    message, clock = request(None), time.perf_counter
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(-10, slices):
        counting = number % 2 == 1
        listeners[place] = metrics.count if counting else count_nothing
        for _ in range(SLICE):
            started = clock()
            await call(message)
            if number >= 0:
                found[counting].append(clock() - started)
    listeners[place] = metrics.count
    return found


async def probes_s(server: VisionServer, call: Any, count: int) -> list[float]:
    """Latencies of ``/readyz`` and ``/metrics`` in turn, while callers keep the server busy."""
    message, port = request(None), server.admin_port
    assert port is not None

    async def caller() -> None:
        while True:
            await call(message)

    def probe(path: str) -> float:
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        connection.getresponse().read()
        connection.close()
        return time.perf_counter() - started

    callers = [asyncio.create_task(caller()) for _ in range(CALLERS_AROUND_PROBES)]
    found = []
    for number in range(count):
        took = await asyncio.to_thread(probe, "/metrics" if number % 10 == 9 else "/readyz")
        if number % 10 != 9:
            found.append(took)
    for one in callers:
        one.cancel()
    await asyncio.wait(callers)
    return found


async def measure(slices: int, probes: int) -> dict[str, Any]:
    server = VisionServer(Settings(port=0, admin_port=0), FakeEngine(TEXT), load_registry(None))
    await server.start()
    await server.load()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(METHOD)
        found = await latencies_s(server, call, slices)
        ready = await probes_s(server, call, probes)
    await server.stop(0)
    off, on = (statistics.median(found[counting]) * 1e3 for counting in (False, True))
    return {
        "calls": len(found[True]),
        "off p50 ms": off,
        "on p50 ms": on,
        "p50 on / off": on / off,
        "/readyz p50 ms": statistics.median(ready) * 1e3,
        "/readyz p99 ms": float(np.percentile(ready, 99)) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it runs")
    arguments = parser.parse_args()
    slices, probes = (20, 50) if arguments.quick else (600, 1000)
    found = asyncio.run(measure(slices, probes))
    more = found["p50 on / off"] - 1
    notes = (
        f"Text only, 1 caller: {more:+.1%} with metrics of calls (target at most {TARGET:+.0%}, "
        f"{'met' if more <= TARGET else 'missed'}). Client and server share one process, and counting "
        f"is switched every {SLICE} calls. `/readyz` is asked by another thread while "
        f"{CALLERS_AROUND_PROBES} callers keep the server busy and every tenth request reads "
        "`/metrics`."
    )
    write_results("call_metrics", [found], notes)
    print(environment())
    print(markdown([found]))
    print(notes)


if __name__ == "__main__":
    main()
