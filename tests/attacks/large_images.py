"""One caller sends many images of 64 megapixels; another one makes ordinary calls meanwhile.

``python -m tests.attacks.large_images [--kind png]`` prints how long the ordinary caller and health
checks wait and what the server's memory does.
"""

from __future__ import annotations

import asyncio
import io
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from service.client import CHANNEL_OPTIONS, read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks.servers import OTHER_KEY, Target, arguments, target
from tests.service.harness import image_bytes, inline

KINDS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG", "quality": 80},
    "progressive": {"format": "JPEG", "quality": 80, "progressive": True, "subsampling": 0},
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "quality": 80, "method": 0},
}
"""Kind of file -> options of Pillow."""


@dataclass
class Outcome:
    """What was seen. Seconds of ordinary calls and health checks; memory of the server in MiB.

    answered, refused: the calls with large images; by their reason.
    """

    ordinary_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    answered: int = 0
    refused: list[str] = field(default_factory=list)
    before_mib: float = 0.0
    peak_mib: float = 0.0
    after_mib: float = 0.0


def large_image(kind: str, side: int) -> bytes:
    """Smooth colours, so that the file stays within the limit of bytes."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    planes = [np.broadcast_to(one, (side, side)) for one in (ramp, ramp[:, None], ramp[::-1])]
    file = io.BytesIO()
    options = dict(KINDS[kind])
    Image.merge("RGB", [Image.fromarray(one) for one in planes]).save(file, **options)  # type: ignore[arg-type]
    return file.getvalue()


async def attack(server: Target, image: bytes, calls: int, images: int, limit_s: float) -> Outcome:
    """Send all calls with large images at once, and ordinary calls until they are done."""
    outcome = Outcome(before_mib=server.memory_mib())
    large_one = pb.Image(data=image, max_pixels=65_536)
    # The answer is not read, and short, so that decoding is what takes time.
    task, short = inline("Is it red?"), pb.SamplingOptions(max_tokens=1)
    request = pb.RunTaskRequest(task=task, sampling=short, images=[large_one] * images)
    beside = [pb.Image(data=image_bytes(1024, 768))]
    small = pb.RunTaskRequest(task=task, sampling=short, images=beside)
    other = (("x-api-key", OTHER_KEY),) if server.key else ()
    done = asyncio.Event()

    async def answered(stub: VisionServiceStub, asked: pb.RunTaskRequest, metadata: Any) -> str:
        """Why a call was refused; empty where it got its one token."""
        try:
            await stub.RunTask(asked, metadata=metadata, timeout=limit_s)
        except grpc.aio.AioRpcError as error:
            reason = read_error(error).reason
            return "" if reason == "OUTPUT_TRUNCATED" else reason
        return ""

    async def large(stub: VisionServiceStub) -> None:
        reason = await answered(stub, request, other)
        if reason:
            outcome.refused.append(reason)
        else:
            outcome.answered += 1

    async def ordinary(stub: VisionServiceStub) -> None:
        while not done.is_set():
            begun = time.monotonic()
            reason = await answered(stub, small, server.metadata)
            assert not reason, f"an ordinary call was refused: {reason}"
            outcome.ordinary_s.append(time.monotonic() - begun)
            await asyncio.sleep(0.1)

    async def health(stub: health_pb2_grpc.HealthStub) -> None:
        while not done.is_set():
            begun = time.monotonic()
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=limit_s)
            outcome.health_s.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)

    async def measure() -> None:
        while not done.is_set():
            outcome.peak_mib = max(outcome.peak_mib, server.memory_mib())
            await asyncio.sleep(0.02)

    async with (
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as theirs,
        grpc.aio.insecure_channel(server.address) as ours,
    ):
        await asyncio.gather(theirs.channel_ready(), ours.channel_ready())
        stub = VisionServiceStub(theirs)
        watching = [
            asyncio.create_task(one)
            for one in (
                ordinary(VisionServiceStub(ours)),
                health(health_pb2_grpc.HealthStub(ours)),
                measure(),
            )
        ]
        await asyncio.gather(*(large(stub) for _ in range(calls)))
        done.set()
        await asyncio.gather(*watching)
    await asyncio.sleep(1)
    outcome.after_mib = server.memory_mib()
    return outcome


def percentile(seconds: list[float], share: float) -> float:
    """The time that this share of the calls does not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kind", choices=KINDS, default="png")
    parser.add_argument("--side", type=int, default=8000, help="of each image, in pixels")
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--images", type=int, default=1, help="of each call")
    parser.add_argument("--seconds", type=float, default=280, help="deadline of each call")
    options = parser.parse_args()
    image = large_image(options.kind, options.side)
    with target(options, keys=True) as server:
        seen = asyncio.run(attack(server, image, options.calls, options.images, options.seconds))
    print(
        f"{options.calls} calls with {options.images} {options.kind} of {options.side}x{options.side}, "
        f"{len(image) / 1e6:.1f} MB each: {seen.answered} answered, "
        f"{len(seen.refused)} refused {sorted(set(seen.refused))}; "
        f"{len(seen.ordinary_s)} ordinary calls: median {percentile(seen.ordinary_s, 0.5):.3f} s, "
        f"slowest {max(seen.ordinary_s):.3f} s; {len(seen.health_s)} health checks: "
        f"p99 {percentile(seen.health_s, 0.99) * 1000:.0f} ms, slowest {max(seen.health_s) * 1000:.0f} ms; "
        f"memory {seen.before_mib:.0f} MiB before, {seen.peak_mib:.0f} at most, {seen.after_mib:.0f} after"
    )


if __name__ == "__main__":
    main()
