"""Large requests whose last byte never comes, sent without a key.

``python -m tests.attacks.withheld`` prints what the server's memory does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tests.attacks.http2 import Connection, message
from tests.attacks.servers import SERVICE, Target, arguments, target


@dataclass
class Outcome:
    """Memory of the server in MiB, and how many calls it had ended by itself."""

    before_mib: float
    peak_mib: float
    after_mib: float
    ended: int


async def attack(
    server: Target,
    streams: int,
    size: int,
    wait_s: float,
    path: bytes = SERVICE + b"RunTask",
    *extra: tuple[bytes, bytes],
) -> Outcome:
    """Send all but the last byte of requests of ``size`` bytes, one connection each, and wait."""
    before = peak = server.memory_mib()
    part = message(bytes(size - 1), length=size)
    connections = [await Connection.open(server.host, server.port) for _ in range(streams)]
    calls = [connection.call(path, None, *extra) for connection in connections]

    async def send(connection: Connection, stream: int) -> None:
        await asyncio.wait_for(connection.send(stream, part), 60)

    sending = asyncio.gather(*map(send, connections, calls), return_exceptions=True)
    for _ in range(int(wait_s / 0.05)):
        peak = max(peak, server.memory_mib())
        await asyncio.sleep(0.05)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    ended = sum(one.ended[call].done() for one, call in zip(connections, calls, strict=True))
    after = server.memory_mib()
    for connection in connections:
        await connection.close()
    return Outcome(before, peak, after, ended)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=60)
    parser.add_argument("--mib", type=int, default=20, help="size of each request")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--path", default="/qwen3vl.v1.VisionService/RunTask")
    options = parser.parse_args()
    with target(options, keys=True) as server:
        path, size = options.path.encode(), options.mib << 20
        seen = asyncio.run(attack(server, options.streams, size, options.seconds, path))
    print(
        f"{options.streams} requests of {options.mib} MiB without their last byte: {seen.ended} were "
        f"ended by the server; memory {seen.before_mib:.0f} MiB before, {seen.peak_mib:.0f} at most, "
        f"{seen.after_mib:.0f} at the end"
    )


if __name__ == "__main__":
    main()
