"""Thousands of calls without a key at once, each with as much of a body as the server lets it send.

``python -m tests.attacks.keyless`` prints what the server's memory does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.attacks.http2 import Connection, message
from tests.attacks.servers import SERVICE, Target, arguments, target

LIMIT_S = 60.0
EVERY_METHOD = tuple(
    SERVICE + name.encode()
    for name in pb.DESCRIPTOR.services_by_name["VisionService"].methods_by_name
)


@dataclass
class Outcome:
    """Memory of the server in MiB, and how many calls it had ended."""

    before_mib: float
    peak_mib: float = 0.0
    calls: int = 0
    ended: int = 0


async def attack(
    server: Target,
    connections: int,
    streams: int,
    seconds: float,
    paths: Sequence[bytes] = (SERVICE + b"RunTask",),
) -> Outcome:
    """Wave after wave of ``streams`` calls on each of the connections.

    The parts of the requests that the server's windows do not let through wait here.
    """
    outcome = Outcome(before_mib=server.memory_mib())
    server.reset_peak()
    until = time.monotonic() + seconds
    body = message(bytes(1 << 20))

    async def wave(connection: Connection) -> None:
        while time.monotonic() < until:
            calls = [connection.call(paths[at % len(paths)], None) for at in range(streams)]
            outcome.calls += streams
            sending = [asyncio.create_task(connection.send(call, body)) for call in calls]
            await asyncio.wait([connection.ended[call] for call in calls], timeout=LIMIT_S)
            outcome.ended += sum(connection.ended[call].done() for call in calls)
            for one in sending:
                one.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    opened = [await Connection.open(server.host, server.port) for _ in range(connections)]
    await asyncio.gather(*map(wave, opened))
    outcome.peak_mib = server.peak_mib()
    for connection in opened:
        await connection.close()
    return outcome


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    with target(options, keys=True) as server:
        seen = asyncio.run(attack(server, options.connections, options.streams, options.seconds))
    print(
        f"{seen.calls} calls without a key, {options.connections * options.streams} at the same time: "
        f"{seen.ended} were ended by the server; memory {seen.before_mib:.0f} MiB before, "
        f"{seen.peak_mib:.0f} at most, {seen.peak_mib - seen.before_mib:+.1f}"
    )


if __name__ == "__main__":
    main()
