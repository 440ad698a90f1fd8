"""What the HTTP front end costs beside a bare Starlette application, LMDeploy's and our gRPC.

Every server runs on the fake engine or answers at once, in a process of its own. Three loads: a text
call of one caller; calls with an image of 100 KB; 64 streams at the same time, of which the time
between two pieces counts. LMDeploy's ``api_server`` runs with a stand-in for generation, see
``benchmarks.api_server``.

``python -m benchmarks.http_overhead`` from the repository root.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.overhead import publish, rounds_of, started
from benchmarks.server_overhead import METHOD, jpeg
from service import logs
from service.engines.fake import FakeEngine
from service.grpc_api.server import GrpcFrontEnd
from service.http_api.server import HttpFrontEnd
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.runtime import Runtime, serve
from service.settings import Settings
from service.tasks.registry import load_registry
from service.web import WebServer

PATH = "/v1/chat/completions"
TEXT = "This is the fake engine."
PIECES, PIECE_S = 60, 0.02
STREAMS = 64
TARGET_OVERHEAD_MS, TARGET_LMDEPLOY, TARGET_IMAGES, TARGET_STREAMS = 0.6, 0.5, 0.8, 2.0


# The servers


async def bare(request: Request) -> Response:
    """Reads the same JSON and answers with JSON of the same size, or with as many events."""
    asked = json.loads(await request.body())
    message = {"role": "assistant", "content": TEXT}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fake"}
    if not asked.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    async def events() -> AsyncIterator[str]:
        for _ in range(PIECES):
            await asyncio.sleep(PIECE_S)
            choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def serve_bare() -> None:
    server = WebServer(Starlette(routes=[Route(PATH, bare, methods=["POST"])]), host="127.0.0.1")
    await server.start()
    print(server.port, 0, flush=True)
    await server.serve()


async def serve_ours(*, streaming: bool) -> None:
    text, delay_s = ("word " * PIECES, PIECE_S) if streaming else (TEXT, 0.0)
    logs.configure()
    settings = Settings(port=0, http_port=0)
    engine = FakeEngine(text, token_delay_s=delay_s)
    runtime = Runtime(settings, [engine], load_registry(None))
    grpc_end, http = GrpcFrontEnd(runtime), HttpFrontEnd(runtime)
    ready = lambda: print(http.port, grpc_end.port, flush=True)  # noqa: E731
    await serve(runtime, [grpc_end, http], on_ready=ready)


SERVERS: dict[str, Any] = {
    "bare": serve_bare,
    "ours": lambda: serve_ours(streaming=False),
    "streaming": lambda: serve_ours(streaming=True),
}


@contextmanager
def server(name: str) -> Iterator[tuple[int, int]]:
    """One of the servers in a process of its own: its ports of HTTP and of gRPC."""
    with started("benchmarks.http_overhead", "--serve", name) as ((http, grpc_port), _):
        yield http, grpc_port


@contextmanager
def api_server() -> Iterator[int]:
    """LMDeploy's server: its port."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started("benchmarks.api_server", folder) as ((port,), _),
    ):
        yield port


# The client


class Caller:
    """One connection of HTTP/1.1; messages are serialised beforehand, answers are not decoded."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**22))

    async def call(self, message: bytes) -> None:
        head = await self._sent(message)
        size = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        await self._reader.readexactly(size)

    async def stream(self, message: bytes) -> list[float]:
        """Seconds between the pieces of a stream."""
        await self._sent(message)
        times = []
        while size := int(await self._reader.readline(), 16):
            await self._reader.readexactly(size + 2)
            times.append(time.perf_counter())
        await self._reader.readline()
        # The last chunks come together, behind the last piece of text.
        return list(np.diff(times[1 : PIECES - 1]))

    async def _sent(self, message: bytes) -> bytes:
        self._writer.write(message)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(head.decode())
        return head

    def close(self) -> None:
        self._writer.close()


def message(data: bytes | None = None, **more: Any) -> bytes:
    """A request with its headers."""
    content: Any = "What is in the image?"
    if data is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": content},
        ]
    document = {"model": "fake", "messages": [{"role": "user", "content": content}], **more}
    body = json.dumps(document).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def latency_ms(port: int, data: bytes, seconds: float) -> float:
    """p50 of one caller."""
    caller = await Caller.connect(port)
    found = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        await caller.call(data)
        found.append(time.perf_counter() - started)
    caller.close()
    return statistics.median(found) * 1e3


async def http_rate(port: int, data: bytes, callers: int, seconds: float) -> float:
    """Calls per second."""
    connections = [await Caller.connect(port) for _ in range(callers)]
    count, started = 0, time.perf_counter()

    async def run(connection: Caller) -> None:
        nonlocal count
        while time.perf_counter() - started < seconds:
            await connection.call(data)
            count += 1

    await asyncio.gather(*map(run, connections))
    rate = count / (time.perf_counter() - started)
    for connection in connections:
        connection.close()
    return rate


async def grpc_rate(port: int, data: bytes, callers: int, seconds: float) -> float:
    """Calls per second."""
    count, started = 0, time.perf_counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD)

        async def run() -> None:
            nonlocal count
            while time.perf_counter() - started < seconds:
                await call(data)
                count += 1

        await asyncio.gather(*(run() for _ in range(callers)))
    return count / (time.perf_counter() - started)


async def between_pieces_ms(port: int) -> float:
    """p99 of the time between two pieces, over all streams."""
    connections = [await Caller.connect(port) for _ in range(STREAMS)]
    data = message(stream=True)
    found = await asyncio.gather(*(one.stream(data) for one in connections))
    for connection in connections:
        connection.close()
    return float(np.percentile([gap for gaps in found for gap in gaps], 99)) * 1e3


def image_request(data: bytes) -> bytes:
    task = pb.Task(inline=pb.InlineTask(user="What is in the image?"))
    return pb.RunTaskRequest(task=task, images=[pb.Image(data=data)]).SerializeToString()


def measure(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Both servers of each comparison take turns; a row is the median of the rounds."""
    data = jpeg(100_000)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with (
        server("bare") as (bare_port, _),
        server("ours") as (http, grpc_port),
        api_server() as lmdeploy_port,
    ):
        for number in range(-1, rounds):
            for name, port in (("bare", bare_port), ("LMDeploy", lmdeploy_port), ("ours", http)):
                value = asyncio.run(latency_ms(port, message(), seconds))
                if number >= 0:
                    note(f"{name} p50", value)
            values = (
                asyncio.run(grpc_rate(grpc_port, image_request(data), 8, seconds)),
                asyncio.run(http_rate(http, message(data), 8, seconds)),
            )
            if number >= 0:
                note("gRPC images", values[0])
                note("HTTP images", values[1])
    with server("bare") as (bare_port, _), server("streaming") as (http, _):
        for _ in range(rounds):
            note("bare p99", asyncio.run(between_pieces_ms(bare_port)))
            note("ours p99", asyncio.run(between_pieces_ms(http)))
    median = {name: statistics.median(values) for name, values in found.items()}
    return [
        _row("text, 1 caller, p50 ms", "bare Starlette", median, "bare p50", "ours p50", found),
        _row(
            "text, 1 caller, p50 ms",
            "LMDeploy's api_server",
            median,
            "LMDeploy p50",
            "ours p50",
            found,
        ),
        _row("image of 100 KB, calls/s", "our gRPC", median, "gRPC images", "HTTP images", found),
        _row(
            f"{STREAMS} streams, p99 ms between pieces",
            "bare Starlette",
            median,
            "bare p99",
            "ours p99",
            found,
        ),
    ]


def _row(
    case: str,
    beside: str,
    median: dict[str, float],
    theirs: str,
    ours: str,
    found: dict[str, list[float]],
) -> dict[str, Any]:
    peer, own = median[theirs], median[ours]
    return {
        "case": case, "beside": beside, "peer": peer, "HTTP": own, "difference": own - peer,
        "ratio": own / peer, "rounds": {name: found[name] for name in (theirs, ours)},
    }  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> str:
    """The targets and whether they are met."""
    text, lmdeploy, image, streams = rows
    checks = [
        (
            f"text +{text['difference']:.2f} ms (target +{TARGET_OVERHEAD_MS})",
            text["difference"] <= TARGET_OVERHEAD_MS,
        ),
        (
            f"text {lmdeploy['ratio']:.2f} x LMDeploy's api_server (target {TARGET_LMDEPLOY})",
            lmdeploy["ratio"] <= TARGET_LMDEPLOY,
        ),
        (
            f"images {image['ratio']:.2f} x gRPC (target {TARGET_IMAGES})",
            image["ratio"] >= TARGET_IMAGES,
        ),
        (
            f"streams {streams['ratio']:.2f} x bare (target {TARGET_STREAMS})",
            streams["ratio"] <= TARGET_STREAMS,
        ),
    ]
    return "; ".join(f"{what}: {'met' if met else 'missed'}" for what, met in checks) + "."


def main() -> None:
    chosen = rounds_of(__doc__, SERVERS, quick_rounds=1)
    if chosen is None:
        return
    rows = measure(*chosen)
    notes = (
        f"Median of {chosen[1]} rounds, the servers taking turns. Each server writes the log that it "
        "writes by default, a line for each call. Client and servers share the machine."
    )
    publish("http_overhead", rows, verdict(rows), notes)


if __name__ == "__main__":
    main()
