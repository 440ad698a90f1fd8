"""Health checks of a server from a process of its own, until stdin ends; prints their latencies.

``python -m benchmarks.attack.probe HOST:PORT``. A kubelet asks now and then; this asks every 20 ms, so
that a server that stops to answer for a moment is seen. An own process, because an attacker keeps the
one that sends busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import CHANNEL_OPTIONS

ROOT = Path(__file__).parents[2]
INTERVAL_S = 0.02
LIMIT_S = 30.0
FEWEST = 200
"""Checks after which it may end: of fewer, the 99th percentile would be the slowest."""


@dataclass
class Health:
    """Latencies in seconds; a check that failed counts as ``LIMIT_S``. Filled when probing ends."""

    seconds: list[float] = field(default_factory=list)

    def percentile_ms(self, percent: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1e3


@contextmanager
def probing(address: str) -> Iterator[Health]:
    """Probe a server while the body runs."""
    health = Health()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.attack.probe", address],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has had its first answer
        try:
            yield health
        finally:
            health.seconds = json.loads(process.communicate()[0])


def main() -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    seconds: list[float] = []
    with grpc.insecure_channel(sys.argv[1], options=CHANNEL_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        stub.Check(request, timeout=LIMIT_S, wait_for_ready=True)
        print("probing", flush=True)
        while not ended.is_set() or len(seconds) < FEWEST:
            time.sleep(INTERVAL_S)
            begun = time.perf_counter()
            try:
                stub.Check(request, timeout=LIMIT_S)
            except grpc.RpcError as error:
                if ended.is_set() and error.code() is grpc.StatusCode.UNAVAILABLE:
                    break  # the case has ended its server
                seconds.append(LIMIT_S)
                continue
            seconds.append(time.perf_counter() - begun)
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
