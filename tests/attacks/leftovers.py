"""Calls with images that fail, on a server without garbage collection: what they leave in memory.

``python -m tests.attacks.leftovers`` prints the growth of the process, client included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc

import psutil

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import failure, image_bytes, inline, run_request, running


async def growth_mib(calls: int, images: int, side: int) -> float:
    """MiB that the process has grown by after calls whose answer is cut."""
    request: pb.RunTaskRequest = run_request(
        inline(), [image_bytes(side, side)] * images, max_tokens=1
    )
    process = psutil.Process()
    async with running() as server:
        for _ in range(2):
            await failure(server.stub.RunTask(request, timeout=60))
        gc.collect()
        gc.disable()
        before = process.memory_info().rss
        for _ in range(calls):
            await failure(server.stub.RunTask(request, timeout=60))
        grown = process.memory_info().rss - before
        gc.enable()
    return grown / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--images", type=int, default=4, help="of each call")
    parser.add_argument("--side", type=int, default=2000, help="of each image, in pixels")
    options = parser.parse_args()
    grown = asyncio.run(growth_mib(options.calls, options.images, options.side))
    decoded = options.images * options.side**2 * 3 / 2**20
    print(
        f"{options.calls} failed calls with {options.images} images, {decoded:.0f} MiB decoded each: "
        f"memory has grown by {grown:.0f} MiB"
    )


if __name__ == "__main__":
    main()
