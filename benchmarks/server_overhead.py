"""What the server costs beside a bare grpc.aio server with the same messages.

Our server runs on the fake engine, the bare one answers every RunTaskRequest with the same
RunTaskResponse; each has a process of its own, with the log going to a file as in production. One
client process sends messages that it serialised beforehand and does not decode the answers, so
that it takes as little as possible of the two servers' machine.

``python -m benchmarks.server_overhead`` from the repository root.
"""

from __future__ import annotations

import asyncio
import gc
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import numpy as np
import psutil
from PIL import Image

from benchmarks.common import Sample, spread
from benchmarks.overhead import publish, rounds_of, started
from lmdeploy_ext.images.files import ImageLimits
from service import logs
from service.engines.fake import FakeEngine
from service.grpc_api import codec
from service.grpc_api.server import VisionServer, options, serve
from service.inference.calls import Answer
from service.inference.images import decode_image
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1 import vision_pb2_grpc as pb_grpc
from service.settings import Settings
from service.tasks.registry import load_registry
from service.types import FinishReason, Timings, Usage

METHOD = "/qwen3vl.v1.VisionService/RunTask"
TEXT = "This is the fake engine."
CALLERS = (1, 8, 64)
TARGET_OVERHEAD_MS, TARGET_RATIO = 1.5, 0.5


# The two servers


class Echo(pb_grpc.VisionServiceServicer):
    """Answers at once with what our server answers."""

    async def RunTask(self, request: pb.RunTaskRequest, context: Any) -> pb.RunTaskResponse:
        usage = Usage(prompt_tokens=4, output_tokens=5)
        timings = Timings(0.0, 1e-5, 2e-5)
        answer = Answer(TEXT, TEXT, None, FinishReason.STOP, usage, timings, "fake")
        return pb.RunTaskResponse(result=codec.encode_result(answer))


async def serve_echo() -> None:
    server = grpc.aio.server(options=options(Settings(), 1000))
    pb_grpc.add_VisionServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def serve_ours(*, metrics: bool = True) -> None:
    def announce(server: VisionServer) -> None:
        if not metrics:
            server.runtime.observation.listeners.clear()
        print(server.port, flush=True)

    logs.configure()
    await serve(Settings(port=0), FakeEngine(TEXT), load_registry(None), on_ready=announce)


SERVERS = {"echo": serve_echo, "ours": serve_ours, "uncounted": partial(serve_ours, metrics=False)}
"""``uncounted`` is ours without metrics of calls."""


@dataclass(frozen=True)
class Server:
    """A running server: its address and its process."""

    address: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """Seconds of processor time so far, all threads."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def server(name: str) -> Iterator[Server]:
    """One of the servers in a process of its own."""
    with started("benchmarks.server_overhead", "--serve", name) as ((port,), process):
        yield Server(f"127.0.0.1:{port}", psutil.Process(process.pid))


# The client


def jpeg(size_bytes: int) -> bytes:
    """A photograph-like JPEG of about this many bytes: smooth colour with some noise."""
    side = int((size_bytes / 0.264) ** 0.5)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (side // 40, side // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def request(data: bytes | None) -> bytes:
    images = [pb.Image(data=data)] if data else []
    task = pb.Task(inline=pb.InlineTask(user="What is in the picture?"))
    return pb.RunTaskRequest(task=task, images=images).SerializeToString()


@dataclass
class Load:
    """What one server did under one load: latencies of all calls, calls per second by round, and
    the processor time of the server."""

    latencies_s: list[float] = field(default_factory=list)
    calls_per_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) * 1e3

    @property
    def cpu_ms(self) -> float:
        """Processor time of the server for one call, in milliseconds."""
        return self.cpu_s / len(self.latencies_s) * 1e3

    @property
    def rate(self) -> float:
        return statistics.median(self.calls_per_s)


async def round_of_calls(call: Any, message: bytes, callers: int, seconds: float) -> Load:
    """Each caller sends its next call when the answer to the last one is there."""
    load = Load()
    clock = time.perf_counter
    end = clock() + seconds

    async def caller() -> None:
        while (started := clock()) < end:
            await call(message)
            load.latencies_s.append(clock() - started)

    started = clock()
    await asyncio.gather(*(caller() for _ in range(callers)))
    load.calls_per_s.append(len(load.latencies_s) / (clock() - started))
    return load


async def compare(
    servers: dict[str, Server], message: bytes, callers: int, seconds: float, rounds: int
) -> dict[str, Load]:
    """All servers under the same load, taking turns; the first round of each does not count."""
    limits = [("grpc.max_send_message_length", -1)]
    channels = {
        name: grpc.aio.insecure_channel(one.address, options=limits)
        for name, one in servers.items()
    }
    calls = {name: channel.unary_unary(METHOD) for name, channel in channels.items()}
    loads = {name: Load() for name in servers}
    for number in range(-1, rounds):
        order = list(servers) if number % 2 else list(reversed(servers))
        for name in order:
            gc.collect()
            before_s = servers[name].cpu_s()
            found = await round_of_calls(calls[name], message, callers, seconds)
            if number >= 0:
                loads[name].cpu_s += servers[name].cpu_s() - before_s
                loads[name].latencies_s += found.latencies_s
                loads[name].calls_per_s += found.calls_per_s
    for channel in channels.values():
        await channel.close()
    return loads


def row(case: str, callers: int, loads: dict[str, Load], decode_ms: float) -> dict[str, Any]:
    echo, ours = loads["echo"], loads["ours"]
    found: dict[str, Any] = {"case": case, "callers": callers}
    for name, load in (("echo", echo), ("ours", ours)):
        found[f"{name} p50 ms"] = load.percentile_ms(50)
        found[f"{name} p99 ms"] = load.percentile_ms(99)
    found["overhead p50 ms"] = found["ours p50 ms"] - found["echo p50 ms"]
    for name, load in (("echo", echo), ("ours", ours)):
        found[f"{name} calls/s"] = spread(Sample(tuple(load.calls_per_s)), 1, 0)
    found["ours / echo"] = ours.rate / echo.rate
    found["echo CPU ms"], found["ours CPU ms"] = echo.cpu_ms, ours.cpu_ms
    if decode_ms:
        found["decoding CPU ms"] = decode_ms
        found["our own CPU ms"] = ours.cpu_ms - echo.cpu_ms - decode_ms
    found["rounds"] = {
        name: {"calls": len(load.latencies_s), "calls_per_s": load.calls_per_s}
        for name, load in loads.items()
    }
    return found


def decoding_ms(data: bytes, rounds: int = 31) -> float:
    """Median processor time of ``decode_image`` alone, in milliseconds."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        decode_image(data, "data", ImageLimits())
        times.append(time.process_time() - started)
    return statistics.median(times) * 1e3


def measure(cases: dict[str, bytes | None], seconds: float, rounds: int) -> list[dict[str, Any]]:
    rows = []
    with server("echo") as echo, server("ours") as ours:
        servers = {"echo": echo, "ours": ours}
        for case, data in cases.items():
            decode_ms = decoding_ms(data) if data else 0.0
            for callers in CALLERS:
                loads = asyncio.run(compare(servers, request(data), callers, seconds, rounds))
                rows.append(row(case, callers, loads, decode_ms))
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The targets and whether they are met."""
    text = [one for one in rows if one["case"] == "text"]
    overhead = text[0]["overhead p50 ms"]
    ratio = min(one["ours / echo"] for one in text)
    return (
        f"Text only, 1 caller: {overhead:.2f} ms over echo (target {TARGET_OVERHEAD_MS}, "
        f"{'met' if overhead <= TARGET_OVERHEAD_MS else 'missed'}). Text only, lowest share of "
        f"echo's calls/s: {ratio:.0%} (target {TARGET_RATIO:.0%}, "
        f"{'met' if ratio >= TARGET_RATIO else 'missed'})."
    )


def main() -> None:
    chosen = rounds_of(__doc__, SERVERS, quick_rounds=2)
    if chosen is None:
        return
    seconds, rounds = chosen
    small, large = jpeg(100_000), jpeg(1_000_000)
    cases = {
        "text": None,
        f"JPEG {len(small) / 1e3:.0f} KB": small,
        f"JPEG {len(large) / 1e6:.1f} MB": large,
    }
    rows = measure(cases, seconds, rounds)
    notes = (
        f"Each cell: {rounds} rounds of {seconds:g} s, the "
        "servers taking turns; calls/s as median (slowest-fastest round), latencies over all "
        "calls. CPU: processor time of the server per call, all threads; for an image it splits "
        "into that of echo (transport), that of decoding alone and the rest, which is our own; at "
        "1 MB most of it are page faults: memory of the decoder goes back to the system between "
        "images of different sizes. Client and server share the machine."
    )
    publish("server_overhead", rows, verdict(rows), notes)


if __name__ == "__main__":
    main()
