"""One key that sends far more than its share: how long another key waits.

``python -m tests.attacks.greedy`` measures calls of one key alone, then beside a key with many callers that
call again at once, whatever they are told.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc

from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.harness import run_request, separate

PIECES = 16
PAUSE_S = 0.01
"""Between two calls of a greedy caller: it refuses to wait, and the machine is not its own."""


async def ordinary(stub: VisionServiceStub, callers: int, calls: int) -> tuple[float, int]:
    """Median of the seconds of answered calls, and the number of calls without an answer."""
    seconds: list[float] = []
    failed = 0

    async def caller() -> None:
        nonlocal failed
        for _ in range(calls):
            begun = time.perf_counter()
            try:
                await stub.RunTask(run_request(), timeout=60, metadata=(("x-api-key", "few"),))
                seconds.append(time.perf_counter() - begun)
            except grpc.aio.AioRpcError:
                failed += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return statistics.median(seconds), failed


async def greedy(stub: VisionServiceStub, outcomes: Counter[str]) -> None:
    while True:
        try:
            await stub.RunTask(run_request(), timeout=60, metadata=(("x-api-key", "many"),))
            outcomes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
        await asyncio.sleep(PAUSE_S)


async def measure(address: str, options: argparse.Namespace) -> None:
    async with (
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
        grpc.aio.insecure_channel(
            address, options=[*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        ) as other,
    ):
        stub, outcomes = VisionServiceStub(channel), Counter[str]()
        alone_s, _ = await ordinary(stub, options.callers, options.calls)
        crowd = [
            asyncio.ensure_future(greedy(VisionServiceStub(other), outcomes))
            for _ in range(options.greedy)
        ]
        await asyncio.sleep(options.warm_s)
        beside_s, failed = await ordinary(stub, options.callers, options.calls)
        for one in crowd:
            one.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    print(f"alone: p50 {alone_s:.3f} s")
    print(
        f"beside {options.greedy} callers of another key: p50 {beside_s:.3f} s, "
        f"{beside_s / alone_s:.2f} times; {failed} of {options.callers * options.calls} refused"
    )
    print(f"calls of the other key: {dict(outcomes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--callers", type=int, default=12, help="of the ordinary key")
    parser.add_argument("--calls", type=int, default=10, help="of each of them")
    parser.add_argument("--greedy", type=int, default=330, help="callers of the greedy key")
    parser.add_argument("--answer-s", type=float, default=1.0, help="time of one answer")
    parser.add_argument("--quota", default="", help="of the greedy key, such as concurrent=64")
    parser.add_argument("--warm-s", type=float, default=3.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("few", "many")}
        keys.write_text(f"few:{digests['few']}\nmany:{digests['many']} {options.quota}\n")
        environment = {"QWEN3VL_API_KEYS_FILE": str(keys)}
        delay_s = options.answer_s / PIECES
        with separate(grace_s=0, delay_s=delay_s, pieces=PIECES, environment=environment) as (
            _,
            address,
        ):
            asyncio.run(measure(address, options))


if __name__ == "__main__":
    main()
