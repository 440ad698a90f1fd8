"""A real server on a free port, a real channel, and short names for what tests build and read."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from service.client import CHANNEL_OPTIONS, CallError, read_error
from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings
from service.structured_output.analyser import Analyser, in_thread
from service.structured_output.pool import GrammarPool
from service.wiring import build_registry

ROOT = Path(__file__).parents[2]
SERVICE = "/qwen3vl.v1.VisionService"


def of_a_closed_loop(record: logging.LogRecord) -> bool:
    """Whether gRPC had an event for the loop of an earlier test, which is closed; that of this test is not."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


class Paced(FakeEngine):
    """Gives the first pieces of an answer at once, and the others when ``go_on`` is set."""

    def __init__(self, answer: str, *, first: int = 1) -> None:
        super().__init__(answer)
        self.first = first
        self.go_on = asyncio.Event()
        self.go_on.set()  # for the warm-up

    async def _step(self, number: int) -> None:
        if number >= self.first:
            await self.go_on.wait()
        await super()._step(number)


@dataclass
class Running:
    """A server that serves, and a stub that talks to it."""

    server: VisionServer
    engine: FakeEngine
    channel: grpc.aio.Channel
    stub: Any

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def raw(self, method: str, data: bytes, **options: Any) -> bytes:
        """Call a unary method with these very bytes."""
        return await self.channel.unary_unary(f"{SERVICE}/{method}")(data, timeout=60, **options)


@asynccontextmanager
async def running(
    engine: FakeEngine | None = None,
    *,
    load: bool = True,
    analyser: Analyser = in_thread,
    pool: GrammarPool | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Start a server on the fake engine; stop it without grace at the end."""
    engine = engine or FakeEngine()
    chosen = Settings(**{"port": 0, **settings})
    registry = build_registry(chosen)
    server = VisionServer(chosen, engine, registry, analyser, pool=pool)
    await server.start()
    try:
        if load:
            await server.load()
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            yield Running(server, engine, channel, VisionServiceStub(channel))
    finally:
        await server.stop(0)


@contextmanager
def separate(
    *,
    grace_s: float,
    delay_s: float,
    pieces: int,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    descriptors: int | None = None,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on the fake engine in a process of its own, and its address; killed at the end.

    It serves when this returns. See ``serve_fake`` for the arguments. log: gets its stderr.
    environment: more variables, such as settings. descriptors: limit of file descriptors.
    """
    arguments = [str(value) for value in (grace_s, delay_s, pieces)]
    limited = ["sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"'] if descriptors else []
    with open(log or os.devnull, "w") as stderr:  # no pipe: nobody would empty it
        server = subprocess.Popen(
            [*limited, sys.executable, "-m", "tests.service.serve_fake", *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert server.stdout is not None
        yield server, f"127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


async def failure(call: Awaitable[Any]) -> CallError:
    """The error of a call that has to fail."""
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return read_error(error)
    raise AssertionError(f"the call succeeded: {response}")


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Wait for something that has to happen."""
    deadline = time.monotonic() + limit_s
    while not condition():  # what is waited for has no event
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def stream_failure(call: Any) -> tuple[list[pb.StreamTaskResponse], CallError]:
    """The messages before the error of a stream that has to fail, and the error."""
    events: list[pb.StreamTaskResponse] = []
    try:
        async for event in call:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return events, read_error(error)
    raise AssertionError(f"the stream succeeded: {events}")


def inline(user: str = "Describe.", **grammar: Any) -> pb.Task:
    """An inline task; the grammar as a keyword: ``json_schema="…"``, ``choice=["a", "b"]``."""
    if "choice" in grammar:
        grammar["choice"] = pb.Choice(options=grammar["choice"])
    constraint = pb.Grammar(**grammar) if grammar else None
    return pb.Task(inline=pb.InlineTask(user=user, grammar=constraint))


def run_request(
    task: pb.Task | None = None, images: list[bytes] | None = None, **sampling: Any
) -> pb.RunTaskRequest:
    """A RunTaskRequest; sampling options as keywords."""
    return pb.RunTaskRequest(
        task=task or inline(),
        images=[pb.Image(data=data) for data in images or ()],
        sampling=pb.SamplingOptions(**sampling) if sampling else None,
    )


def image_bytes(width: int = 64, height: int = 48, file_format: str = "JPEG") -> bytes:
    """A colourful image as the bytes of a file."""
    ramp = np.linspace(0, 255, width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, file_format)
    return buffer.getvalue()


def png_header_only(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not have: a bomb, cheap to send."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
