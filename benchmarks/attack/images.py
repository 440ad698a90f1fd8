"""Attacks with images: small files that are large when decoded, many large ones, endless headers."""

from __future__ import annotations

import asyncio
import io
import resource
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from benchmarks.attack.case import Value, case, health, share, true
from benchmarks.attack.probe import probing
from benchmarks.attack.servers import MIB, Server, channel_to, peak, serving, text_request, waits
from service.client import read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.test_image_requests import tiny

SIDE = 8000
"""64 megapixels: the default of max_image_pixels."""
DRAWING = Path(__file__).parents[2] / "examples" / "drawings" / "samples" / "night-desert.png"
ONE_IMAGE_MIB = 300.0


def image(kind: str, *, mode: str = "RGB", side: int = SIDE, **options: Any) -> bytes:
    """A file with coarse noise: it compresses well, and every pixel is decoded."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (side // 100, side // 100, len(mode)), dtype=np.uint8)
    large = Image.fromarray(small, mode).resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, kind, **options)
    return buffer.getvalue()


def request(*images: bytes, choice: bool = True) -> pb.RunTaskRequest:
    """A request with a short answer about images."""
    grammar = {"choice": pb.Choice(options=["yes", "no"])} if choice else {}
    found = text_request("Is it large?", **grammar)
    found.images.extend(pb.Image(data=data) for data in images)
    return found


async def ends(
    server: Server, sent: list[pb.RunTaskRequest], caller: str = "ordinary"
) -> list[str]:
    """Send all at once; OK or the reason of each."""

    async def one(message: pb.RunTaskRequest) -> str:
        async with channel_to(server) as channel:
            stub: Any = VisionServiceStub(channel)
            try:
                await stub.RunTask(message, metadata=server.metadata(caller), timeout=120)
            except grpc.aio.AioRpcError as error:
                return read_error(error).reason or error.code().name
        return "OK"

    return list(await asyncio.gather(*(one(message) for message in sent)))


@case(
    "tiny-huge",
    "one request of 2,560 bytes: 64 × a 36-byte WebP of 8000×8000 pixels",
    "1.1 → 14.5 GB, 13.4 GB kept; refused after 35 s",
)
def tiny_images(short: bool) -> Iterable[Value]:
    with serving() as server, probing(server.address) as probe, peak(server) as added:
        begun = time.monotonic()
        (end,) = asyncio.run(ends(server, [request(*[tiny(SIDE, SIDE)] * 64)]))
        took = time.monotonic() - begun
    yield true("refused for its pixels", end == "IMAGES_TOO_MANY_PIXELS")
    yield Value("until it is refused", took, "s", 1)
    yield Value("memory added", added[0], "MiB", 50)
    yield health(probe)


def _one_image(data: bytes, bound: float | None) -> Iterable[Value]:
    with serving() as server:
        warm = request(DRAWING.read_bytes())
        assert asyncio.run(ends(server, [warm])) == ["OK"]
        with probing(server.address) as probe, peak(server) as added:
            begun = time.monotonic()
            (end,) = asyncio.run(ends(server, [request(data)]))
            took = time.monotonic() - begun
    yield true(f"answered, or refused from its header ({end})", end == "OK" or took < 2)
    yield Value("memory added", added[0], "MiB", bound)
    yield Value("the call took", took, "s")
    yield health(probe)


@case("one-jpeg", "one baseline JPEG of 64 megapixels", "+612 MiB")
def one_jpeg(short: bool) -> Iterable[Value]:
    return _one_image(image("JPEG"), ONE_IMAGE_MIB)


@case("one-png", "one RGB PNG of 64 megapixels", "+611 MiB")
def one_png(short: bool) -> Iterable[Value]:
    return _one_image(image("PNG", compress_level=1), ONE_IMAGE_MIB)


@case("one-progressive-jpeg", "one progressive JPEG (4:4:4) of 64 megapixels", "+0.4–0.6 GB")
def one_progressive_jpeg(short: bool) -> Iterable[Value]:
    data = image("JPEG", progressive=True, subsampling=0)
    return _one_image(data, DECODING_MIB)


@case("one-rgba-png", "one RGBA PNG of 64 megapixels", "+1,221 MiB")
def one_rgba_png(short: bool) -> Iterable[Value]:
    return _one_image(image("PNG", mode="RGBA", compress_level=1), DECODING_MIB)


@case("one-webp", "one WebP of 64 megapixels", "+1,101 MiB")
def one_webp(short: bool) -> Iterable[Value]:
    return _one_image(image("WEBP", method=0, quality=50), DECODING_MIB)


DECODING_MIB = 1536.0
"""The default of max_decoding_bytes: what decoding may take for all calls together."""


@case(
    "large-images",
    "one caller sends 64 PNG of 64 megapixels at once; another asks about a drawing",
    "37 s for the ordinary call",
)
def large_images(short: bool) -> Iterable[Value]:
    data = image("PNG", compress_level=1)
    with serving(keys=True) as server:
        ordinary = request(DRAWING.read_bytes())
        assert asyncio.run(ends(server, [ordinary])) == ["OK"]
        with probing(server.address) as probe, peak(server) as added:
            seconds = 5 if short else 25
            attack = _beside(server, [request(data)] * 64, ordinary, seconds)
            found, ended = asyncio.run(attack)
    yield Value("slowest ordinary call", max(found), "s", 2)
    yield Value("large images that were answered meanwhile", ended.count("OK"))
    yield Value("large images that were refused meanwhile", len(ended) - ended.count("OK"))
    yield Value("memory added", added[0], "MiB", DECODING_MIB + 1024)
    yield health(probe)


async def _beside(
    server: Server, sent: list[pb.RunTaskRequest], ordinary: pb.RunTaskRequest, seconds: float
) -> tuple[list[float], list[str]]:
    """Seconds of the ordinary calls, and how those of the attack had ended by then."""
    attack = [asyncio.create_task(ends(server, [one], "attacker")) for one in sent]
    await asyncio.sleep(0.5)
    found = await waits(server, ordinary, seconds)
    ended = [one.result()[0] for one in attack if one.done()]
    for one in attack:
        one.cancel()
    await asyncio.gather(*attack, return_exceptions=True)
    return found, ended


@case(
    "queued-images",
    "20 calls with 57 MB of images at once",
    "186 MB each: 3.7 GB; the queue ≈ 59 GB",
)
def queued_images(short: bool) -> Iterable[Value]:
    part = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, "PNG", compress_level=0)
    data = buffer.getvalue()
    sent = [request(data, data, data)] * 20
    with serving() as server, probing(server.address) as probe, peak(server) as added:
        found = asyncio.run(ends(server, sent))
    yield share("calls answered or refused as OVERLOADED", sum(
        end in ("OK", "OVERLOADED") for end in found), 20)  # fmt: skip
    yield Value("memory added for each call", added[0] / 20, "MiB", 3 * len(data) / MIB * 1.5)
    yield Value("memory added", added[0], "MiB")
    yield health(probe)


def segments(count: int) -> bytes:
    """A JPEG file with so many empty segments before its image."""
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    data = small.getvalue()
    return data[:2] + b"\xff\xe5\x00\x02" * count + data[2:]


def chunks(count: int) -> bytes:
    """A PNG file with so many empty chunks before its image."""
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    data = small.getvalue()
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return data[:33] + empty * count + data[33:]


@case(
    "endless-headers",
    "a JPEG of 5 million segments, a PNG of 1.5 million chunks",
    "4.5 and 2.9 s of Python each",
)
def endless_headers(short: bool) -> Iterable[Value]:
    with serving(engine="fake") as server:
        for name, data in (("segments", segments(5_000_000)), ("chunks", chunks(1_500_000))):
            with probing(server.address) as probe:
                begun = time.monotonic()
                (end,) = asyncio.run(ends(server, [request(data, choice=False)]))
                took = time.monotonic() - begun
            yield true(f"{name}: refused ({end})", end == "IMAGE_INVALID")
            yield Value(f"{name}: until it is refused", took, "s", 1)
            yield health(probe)


@case(
    "small-memory",
    "a PNG of 25 megapixels where the system has no memory for it",
    "'image is damaged'",
)
def small_memory(short: bool) -> Iterable[Value]:
    data = image("PNG", side=5000, compress_level=1)
    with serving(engine="fake") as server:
        used = server.process.memory_info().vms
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (used + 50 * MIB,) * 2)
        (end,) = asyncio.run(ends(server, [request(data, choice=False)]))
        (again,) = asyncio.run(ends(server, [request(DRAWING.read_bytes(), choice=False)]))
    yield true(f"the image is not blamed ({end})", end in ("OVERLOADED", "OK"))
    yield true("the next call is answered", again == "OK")
