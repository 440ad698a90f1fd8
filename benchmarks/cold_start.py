"""Cold start: ``python -m service serve`` on the bundled model, from the process to the first answer.

``python -m benchmarks.cold_start`` from the repository root. Every round starts a new process and
asks one question about a drawing under a JSON schema. There is no peer; the targets stand in the
report. The files are in the page cache after the first round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import Sample, environment, markdown, spread, write_results
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "examples" / "drawings" / "samples" / "night-desert.png"
SCHEMA = """{"type": "object", "additionalProperties": false, "required": ["count"],
 "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}}}"""
START_LIMIT_S = 120.0
POLL_S = 0.01
RECONNECT = [
    (f"grpc.{name}_reconnect_backoff_ms", 50) for name in ("initial", "min", "max")
]  # a new try every 50 ms
MIB = 1 << 20

Round = dict[str, float]


@contextmanager
def server() -> Iterator[tuple[psutil.Popen, str]]:
    """A server on the bundled model and its address, which may not answer yet."""
    with psutil.Popen(
        [sys.executable, "-m", "service", "serve", "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, f"localhost:{_port(process)}"
        finally:
            process.terminate()
            process.stderr.read()  # what it says until it has ended


def _port(process: psutil.Popen) -> int:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening " in line:
            return int(line.rpartition(" port=")[2].split()[0])
    raise RuntimeError("The server did not start:\n" + "".join(lines))


def wait_until_serving(channel: grpc.Channel, deadline: float) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    while time.perf_counter() < deadline:
        response = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"The server was not SERVING after {START_LIMIT_S:.0f} s")


def one_round() -> Round:
    """Seconds to the port, to SERVING, of the first and of the second answer; resident memory."""
    grammar = pb.Grammar(json_schema=SCHEMA)
    task = pb.Task(inline=pb.InlineTask(user="How many objects are there?", grammar=grammar))
    request = pb.RunTaskRequest(task=task, images=[pb.Image(data=DRAWING.read_bytes())])
    begun = time.perf_counter()
    with server() as (process, address), grpc.insecure_channel(address, RECONNECT) as channel:
        port = time.perf_counter()
        wait_until_serving(channel, begun + START_LIMIT_S)
        serving = time.perf_counter()
        before = resident(process)
        stub = VisionServiceStub(channel)
        stub.RunTask(request, timeout=60)
        first = time.perf_counter()
        stub.RunTask(request, timeout=60)
        second = time.perf_counter()
        after = resident(process)
        alone = process.memory_info().rss
    return {
        "process to open port, s": port - begun,
        "process to SERVING, s": serving - begun,
        "first answer, s": first - serving,
        "second answer, s": second - first,
        "resident memory when SERVING, MiB": before / MIB,
        "resident memory after two answers, MiB": after / MIB,
        "of that the server's own process, MiB": alone / MIB,
    }


def resident(process: psutil.Process) -> int:
    """Bytes of a server and of the processes that it has started to analyse grammars."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    rounds = [one_round() for _ in range(1 if arguments.quick else arguments.repeats)]
    rows: list[dict[str, object]] = []
    for name in rounds[0]:
        sample = Sample(tuple(one[name] for one in rounds))
        digits = 0 if name.endswith("MiB") else 3
        rows.append(
            {
                "what": name,
                "median (fastest-slowest)": spread(sample, 1, digits),
                "values": sample.row(1),
            }
        )
    notes = (
        f"`python -m service serve` on the bundled model, {len(rounds)} processes, one after the "
        "other. The answer is JSON under a schema, about one drawing. Resident memory is that of the "
        "server and of its processes that analyse grammars, the libraries that they share counted in "
        "each."
    )
    write_results("cold_start", rows, notes)
    print(environment())
    print(markdown([{k: v for k, v in row.items() if k != "values"} for row in rows]))


if __name__ == "__main__":
    main()
