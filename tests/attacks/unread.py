"""Streams that nobody reads: calls of StreamTask with an HTTP/2 window of 0.

``python -m tests.attacks.unread`` prints whether others are served meanwhile, and how long SIGTERM
takes.
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass

import grpc
import psutil

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks.http2 import Connection, message
from tests.attacks.servers import SERVICE, Target, arguments, target


@dataclass
class Outcome:
    """answered: ordinary calls that were, within 2 s each. drain_s: from SIGTERM to the end."""

    answered: int
    tried: int
    drain_s: float | None = None


def stream_request() -> bytes:
    """A request for a text."""
    task = pb.Task(inline=pb.InlineTask(user="Describe."))
    return pb.StreamTaskRequest(task=task).SerializeToString()


async def open_unread(
    host: str, port: int, calls: int, *extra: tuple[bytes, bytes]
) -> tuple[Connection, list[int]]:
    """Begin calls whose answers may never be sent."""
    connection = await Connection.open(host, port, window=0)
    body = message(stream_request())
    path = SERVICE + b"StreamTask"
    return connection, [connection.call(path, body, *extra) for _ in range(calls)]


def wait_for_the_end(process: psutil.Process) -> None:
    """Wait until a process has ended, even where its parent has not asked yet."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


async def attack(server: Target, calls: int, tries: int = 5, *, stop: bool = False) -> Outcome:
    """Open unread streams, try ordinary calls beside them, then end the server."""
    extra = tuple((name.encode(), value.encode()) for name, value in server.metadata)
    connection, _ = await open_unread(server.host, server.port, calls, *extra)
    await asyncio.sleep(2)
    outcome = Outcome(0, tries)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = VisionServiceStub(channel)
        task = pb.Task(inline=pb.InlineTask(user="Describe."))
        for _ in range(tries):
            try:
                request = pb.RunTaskRequest(task=task)
                await stub.RunTask(request, metadata=server.metadata, timeout=2)
                outcome.answered += 1
            except grpc.aio.AioRpcError:
                continue
    if stop and server.process is not None:
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for_the_end, server.process)
        outcome.drain_s = time.monotonic() - begun
    await connection.close()
    return outcome


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calls", type=int, default=64)
    options = parser.parse_args()
    with target(options) as server:
        seen = asyncio.run(attack(server, options.calls, stop=not options.server))
    drained = "" if seen.drain_s is None else f"; SIGTERM took {seen.drain_s:.1f} s"
    print(
        f"{options.calls} unread streams: {seen.answered} of {seen.tried} ordinary calls were "
        f"answered{drained}"
    )


if __name__ == "__main__":
    main()
