"""More callers than the queue holds, all of which obey RetryInfo: answers per second, and refusals.

``python -m tests.attacks.crowd`` compares 500 callers with 64, who always find a slot. The engine is
the fake one; with 64 slots it gives 25 answers per second.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import grpc

from service.client import CHANNEL_OPTIONS, read_error
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks.servers import Target, arguments, target
from tests.service.harness import run_request

SLOTS, PIECES, ANSWER_S = 64, 16, 2.56


async def crowd(server: Target, callers: int, answers: int) -> tuple[float, int]:
    """Seconds for so many answers of so many callers together, and how often calls were refused."""
    left, refusals = answers, 0

    async def caller(stub: VisionServiceStub) -> None:
        nonlocal left, refusals
        while left > 0:
            left -= 1
            while True:
                try:
                    await stub.RunTask(run_request(), timeout=600, metadata=server.metadata)
                    break
                except grpc.aio.AioRpcError as error:
                    found = read_error(error)
                    if found.retry_after_s is None:
                        raise
                    refusals += 1
                await asyncio.sleep(found.retry_after_s)

    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        stub = VisionServiceStub(channel)
        begun = time.perf_counter()
        await asyncio.gather(*(caller(stub) for _ in range(callers)))
        return time.perf_counter() - begun, refusals


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--callers", type=int, default=500)
    parser.add_argument("--answers", type=int, default=1500, help="of all callers together")
    options = parser.parse_args()
    _run(options)


def _run(options: argparse.Namespace) -> None:
    rates = []
    for callers in (SLOTS, options.callers):
        with target(options, delay_s=ANSWER_S / PIECES, pieces=PIECES) as server:
            seconds, refusals = asyncio.run(crowd(server, callers, options.answers))
        rates.append(options.answers / seconds)
        print(f"{callers:4} callers: {rates[-1]:.1f} answers/s, {refusals} refusals")
    print(f"{rates[1] / rates[0]:.2f} of the answers/s of {SLOTS} callers")


if __name__ == "__main__":
    main()
