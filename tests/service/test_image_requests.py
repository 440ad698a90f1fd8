"""Requests with many and large images through a real server: what is refused before anything is
decoded, who waits, who passes, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import struct
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image, ImageFile

from service.engines.fake import FakeEngine
from service.engines.reference import ReferenceEngine
from service.inference import decoding
from service.inference.calls import EncodedImage
from service.inference.decoding import ImageDecoder
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import MIB
from service.wiring import BUNDLED_MODEL
from tests.service.harness import Running, failure, image_bytes, inline, run_request, running, until


def plain(width: int, height: int, file_format: str = "WEBP", **options: Any) -> bytes:
    """An image of one colour: few bytes, many pixels."""
    buffer = io.BytesIO()
    if file_format == "WEBP":
        options["lossless"] = True
    Image.new("RGB", (width, height)).save(buffer, file_format, **options)
    return buffer.getvalue()


def tiny(width: int, height: int) -> bytes:
    """A lossless WebP file of 36 bytes: every code has one symbol, so pixels take no bits."""
    bits = (width - 1) | (height - 1) << 14 | 0b0001 << 35 | 0b0001 << 39 | 0b0001 << 43
    bits |= 0b0001 << 47 | 0b0001 << 51
    body = b"VP8L" + struct.pack("<I", 16) + b"\x2f" + bits.to_bytes(15, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


BOMB = tiny(8000, 8000)
LARGE = plain(2000, 1000, "PNG")
"""Large where ``max_decoding_bytes`` is the least that is allowed."""


@pytest.fixture
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    monkeypatch.setattr(decoding, "decode", lambda *found: decoded.append(found))
    yield
    assert decoded == []


# Refused by their headers


@pytest.mark.usefixtures("nothing_decoded")
async def test_the_pixels_of_a_request_are_bounded() -> None:
    assert len(BOMB) == 36
    async with running() as started:
        error = await failure(started.stub.RunTask(run_request(images=[BOMB] * 64), timeout=60))
        limits = (await started.stub.GetModel(pb.GetModelRequest(), timeout=60)).limits
    assert limits.max_request_pixels == 800_000_000
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "IMAGES_TOO_MANY_PIXELS",
    )
    assert list(error.fields) == ["images"]
    assert error.metadata["limit"] == "800000000"
    assert error.metadata["actual"] == str(64 * 8000 * 8000)


@pytest.mark.usefixtures("nothing_decoded")
async def test_all_headers_are_read_before_the_first_image_is_decoded() -> None:
    async with running() as started:
        request = run_request(images=[image_bytes(), image_bytes(), b"no image"])
        error = await failure(started.stub.RunTask(request, timeout=60))
    assert list(error.fields) == ["images[2].data"]


@pytest_asyncio.fixture(params=["fake", pytest.param("reference", marks=pytest.mark.slow)])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    engine: Any = FakeEngine(context_length=2048)
    if request.param == "reference":
        engine = ReferenceEngine(BUNDLED_MODEL, context_length=2048)
    async with running(engine) as started:
        yield started


@pytest.mark.usefixtures("nothing_decoded")
async def test_a_context_that_is_too_long_decodes_nothing(server: Running) -> None:
    sent = [pb.Image(data=BOMB, min_pixels=1_500_000, max_pixels=2_000_000)] * 2
    request = pb.RunTaskRequest(task=inline(), images=sent)
    request.sampling.max_tokens = 16
    error = await failure(server.stub.RunTask(request, timeout=60))
    assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["images"])
    parts = [pb.Part(image=one) for one in sent]
    talk = pb.InlineTask(messages=[pb.Message(role=pb.ROLE_USER, parts=parts)])
    error = await failure(
        server.stub.RunTask(pb.RunTaskRequest(task=pb.Task(inline=talk)), timeout=60)
    )
    assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["task.inline.messages"])
    one = pb.RunTaskRequest(task=inline(), images=sent[:1])
    one.sampling.max_tokens = 1024
    error = await failure(server.stub.RunTask(one, timeout=60))
    assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["sampling.max_tokens"])


# Decoded


class Watched:
    """Counts the images that exist at full size, and keeps those of some size back on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[weakref.ref[Any]] = []
        self.most = self.decoded = self.inside = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self._decode = decoding.decode
        monkeypatch.setattr(decoding, "decode", self)

    def __call__(self, data: bytes, header: Any, field: str, limits: Any) -> Any:
        with self._lock:
            self.inside += header.width > 1000
        if header.width > 1000:
            self.gate.wait(20)
        pixels = self._decode(data, header, field, limits)
        with self._lock:
            self.decoded += 1
            self.alive = [*self._living(), weakref.ref(pixels)]
            self.most = max(self.most, len(self.alive))
        return pixels

    def _living(self) -> list[weakref.ref[Any]]:
        return [one for one in self.alive if one() is not None]

    @property
    def living(self) -> int:
        return len(self._living())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    one = Watched(monkeypatch)
    yield one
    one.gate.set()


async def test_images_of_a_request_never_exist_at_once_at_full_size(watched: Watched) -> None:
    async with running() as started:
        await started.stub.RunTask(
            run_request(images=[image_bytes()] * 40, max_tokens=8), timeout=60
        )
    assert watched.decoded == 40
    assert watched.most <= 3  # two at a time, and one that is just let go


@pytest.mark.slow
async def test_large_images_of_one_caller_do_not_hold_up_the_others(watched: Watched) -> None:
    """Neither the threads nor the slots."""
    watched.gate.clear()
    async with running(max_decoding_bytes=64 * MIB, max_concurrent=4) as started:
        large = [
            started.stub.RunTask(run_request(images=[LARGE] * 3), timeout=60) for _ in range(12)
        ]
        await until(lambda: watched.inside > 0)
        for _ in range(5):
            await started.stub.RunTask(run_request(images=[image_bytes()] * 4), timeout=60)
        watched.gate.set()
        await asyncio.gather(*large)
        inference = started.server.servicer.inference
        assert inference.decoder.memory.held == inference.encoded.held == 0
        assert inference.large.active == inference.admission.active == 0


async def test_images_of_two_callers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller with one image does not wait for all images of another one."""
    order: list[int] = []
    decode, go_on = decoding.decode, threading.Event()

    def noted(data: bytes, header: Any, field: str, limits: Any) -> Any:
        go_on.wait(20)
        order.append(header.width)
        return decode(data, header, field, limits)

    monkeypatch.setattr(decoding, "decode", noted)
    async with running() as started:
        inference = started.server.servicer.inference
        many = started.stub.RunTask(run_request(images=[image_bytes(80, 48)] * 40), timeout=60)
        await until(lambda: inference.decoder.memory.held > 0)
        one = started.stub.RunTask(run_request(images=[image_bytes(64, 48)]), timeout=60)
        await until(lambda: inference.admission.active == 2)
        go_on.set()
        await asyncio.gather(many, one)
    assert order.index(64) < 12


async def test_a_caller_with_many_calls_does_not_stand_before_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The images of all calls of one caller wait for a thread; the next turn is the other's."""
    keys = tmp_path / "keys"
    digests = (f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("many", "few"))
    keys.write_text("".join(digests))
    order: list[int] = []
    decode, go_on = decoding.decode, threading.Event()

    def noted(data: bytes, header: Any, field: str, limits: Any) -> Any:
        go_on.wait(60)
        order.append(header.width)
        return decode(data, header, field, limits)

    monkeypatch.setattr(decoding, "decode", noted)
    async with running(api_keys_file=keys) as started:
        inference = started.server.servicer.inference

        def call(key: str, width: int) -> Any:
            request = run_request(images=[image_bytes(width, 48)] * 2)
            return started.stub.RunTask(request, timeout=120, metadata=[("x-api-key", key)])

        many = [call("many", 80) for _ in range(20)]
        await until(lambda: inference.admission.active == 20, 60)
        few = call("few", 64)
        await until(lambda: inference.admission.active == 21, 60)
        go_on.set()
        await asyncio.gather(few, *many)
    # First come the images whose threads had begun, then one caller after the other. Without turns
    # the two images would be the last ones; a few places depend on the threads.
    places = [place for place, width in enumerate(order) if width == 64]
    assert len(places) == 2
    assert places[-1] < len(order) // 2


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_decoded")
async def test_an_image_that_never_fits_into_memory_is_refused_by_its_header() -> None:
    """With the numbers; one that fits does not have to wait for it."""
    async with running(max_decoding_bytes=64 * MIB) as started:
        for data, needs in (
            (plain(4000, 4000, "PNG"), 64_000_000),
            (plain(2400, 2400, "JPEG", progressive=True, subsampling=0), 57_600_000),
            (tiny(2000, 2000), 50_000_000),
        ):
            request = run_request(images=[image_bytes(), data])
            error = await failure(started.stub.RunTask(request, timeout=60))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
            assert error.reason == "IMAGE_NEEDS_TOO_MUCH_MEMORY"
            assert list(error.fields) == ["images[1].data"]
            assert error.metadata["limit"] == str(48 * MIB)
            assert needs < int(error.metadata["actual"]) < 1.5 * needs
            assert error.metadata["actual"] in error.message


# Settings of images


async def test_settings_of_images_reach_every_call() -> None:
    """Formats, the colour of the background, and JPEG files that are decoded at a part of their size."""
    seen: list[tuple[int, ...]] = []

    class Seeing(FakeEngine):
        async def generate(self, request: Any) -> Any:
            for image in request.all_images:
                pixels = await image.reduced(np.copy)
                seen.append((*pixels.shape[:2], *pixels[0, 0]))
            async for chunk in super().generate(request):
                yield chunk

    clear = io.BytesIO()
    Image.new("RGBA", (20, 10), (0, 0, 0, 0)).save(clear, "PNG")
    large = plain(2000, 1500, "JPEG")
    options = {"image_formats": "jpeg,png", "image_background": "#0a141e"}
    async with running(
        Seeing(), max_image_pixels=1_000_000, jpeg_scaled_pixels=1_000_000, **options
    ) as started:
        request = run_request(images=[clear.getvalue(), large])
        usage = (await started.stub.RunTask(request, timeout=60)).result.usage
        webp = await failure(started.stub.RunTask(run_request(images=[BOMB]), timeout=60))
        over = plain(2100, 2000, "JPEG")
        refused = await failure(started.stub.RunTask(run_request(images=[over]), timeout=60))
    assert seen == [(10, 20, 10, 20, 30), (750, 1000, 0, 0, 0)]
    assert usage.image_tokens == 1 + round(750 * 1000 / 1024)
    assert (webp.reason, webp.metadata["found"]) == ("IMAGE_FORMAT_UNSUPPORTED", "WebP")
    assert "convert it to JPEG" in webp.message
    assert refused.reason == "IMAGE_TOO_MANY_PIXELS"
    assert (refused.metadata["limit"], refused.metadata["actual"]) == ("4000000", "4200000")


async def test_a_quota_counts_the_pixels_of_a_file_that_is_decoded_at_a_part_of_its_size(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"caller:{hashlib.sha256(b'key').hexdigest()} megapixels_per_minute=3.01\n")
    large = run_request(images=[plain(2000, 1500, "JPEG")])
    async with running(api_keys_file=keys, jpeg_scaled_pixels=1_000_000) as started:
        metadata = [("x-api-key", "key")]
        await started.stub.RunTask(large, timeout=60, metadata=metadata)
        error = await failure(started.stub.RunTask(large, timeout=60, metadata=metadata))
    assert (error.reason, error.metadata["quota"]) == ("QUOTA_EXCEEDED", "megapixels_per_minute")


# Encoded bytes


def heavy(size: int) -> bytes:
    """A small image in a large file."""
    return image_bytes().ljust(size, b"\0")


async def test_encoded_bytes_are_waited_for_and_small_requests_pass() -> None:
    engine = FakeEngine()
    async with running(engine, max_encoded_bytes=4 * MIB, max_image_bytes=3 * MIB) as started:
        inference = started.server.servicer.inference
        engine.hang_after = 0
        first = started.stub.RunTask(run_request(images=[heavy(3 * MIB)]), timeout=60)
        await until(lambda: engine.active_requests == 1)
        second = started.stub.RunTask(run_request(images=[heavy(3 * MIB)]), timeout=60)
        await until(lambda: inference.encoded.waiting > 0)
        small = started.stub.RunTask(run_request(images=[image_bytes()]), timeout=60)
        await until(lambda: engine.active_requests == 2)
        error = await failure(
            started.stub.RunTask(run_request(images=[heavy(2 * MIB)]), timeout=60)
        )
        assert (error.code, error.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
        )
        assert error.retry_after_s
        first.cancel()
        await until(lambda: engine.active_requests == 2 and inference.encoded.waiting == 0)
        small.cancel()
        second.cancel()
        await until(lambda: inference.encoded.held == 0)


async def test_the_wait_for_memory_ends_with_the_deadline() -> None:
    engine = FakeEngine()
    async with running(
        engine, max_encoded_bytes=4 * MIB, max_image_bytes=3 * MIB, inference_timeout_s=0.5
    ) as started:
        engine.hang_after = 0
        calls = [
            failure(started.stub.RunTask(run_request(images=[heavy(3 * MIB)]), timeout=60))
            for _ in range(2)
        ]
        assert {error.reason for error in await asyncio.gather(*calls)} == {"INFERENCE_TIMEOUT"}
        assert started.server.servicer.inference.encoded.held == 0


def variables_of_handlers() -> dict[str, object]:
    """What the frames of handlers in work hold, by name."""
    found: dict[str, object] = {}
    for one in gc.get_objects():
        # By its type: isinstance asks lazy objects of other libraries for their class.
        if type(one) in (CoroutineType, AsyncGeneratorType):
            frame = one.cr_frame if type(one) is CoroutineType else one.ag_frame
            if frame is not None and one.__qualname__.startswith("VisionServicer."):
                found |= frame.f_locals
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["AnalyzeImage", "RunTask", "StreamTask"])
async def test_a_call_in_work_holds_its_images_once(method: str) -> None:
    """As bytes, no more in the message that they came in."""
    engine = FakeEngine()
    kinds = {
        "AnalyzeImage": pb.AnalyzeImageRequest,
        "RunTask": pb.RunTaskRequest,
        "StreamTask": pb.StreamTaskRequest,
    }
    async with running(engine) as started:
        engine.hang_after = 0
        request = kinds[method](images=[pb.Image(data=image_bytes())])
        if method != "AnalyzeImage":
            request.task.CopyFrom(inline())
        call = getattr(started.stub, method)(request, timeout=60)
        del request
        await until(lambda: engine.active_requests == 1)
        held = variables_of_handlers()
        assert "call" in held, "the handler is not seen"
        assert "request" not in held
        call.cancel()


# What failed calls leave behind


def damaged(engine: FakeEngine) -> pb.RunTaskRequest:
    return run_request(images=[image_bytes(), image_bytes()[:-200], image_bytes()])


def too_long(engine: FakeEngine) -> pb.RunTaskRequest:
    return run_request(images=[image_bytes()] * 3, max_tokens=1_000_000)


def crashing(engine: FakeEngine) -> pb.RunTaskRequest:
    engine.crash_after = 0
    return run_request(images=[image_bytes()] * 3)


def no_image(engine: FakeEngine) -> pb.RunTaskRequest:
    return run_request(images=[image_bytes(), b"no image"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        damaged,
        *(pytest.param(case, marks=pytest.mark.slow) for case in (too_long, crashing, no_image)),
    ],
)
async def test_a_failed_call_keeps_no_image(
    case: Callable[[FakeEngine], pb.RunTaskRequest],
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the collector of cycles: neither pixels nor encoded bytes stay."""
    sent: list[EncodedImage] = []
    opened = ImageDecoder.open

    async def noted(self: ImageDecoder, encoded: tuple[EncodedImage, ...], caller: str) -> Any:
        sent.extend(encoded)
        return await opened(self, encoded, caller)

    monkeypatch.setattr(ImageDecoder, "open", noted)
    engine = FakeEngine()
    async with running(engine) as started:
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                await failure(started.stub.RunTask(case(engine), timeout=60))
            await until(lambda: watched.living == 0)
            assert sent
            assert not any(one.data for one in sent)
        finally:
            gc.enable()


@pytest.mark.parametrize("where", ["decoder", "reduction"])
async def test_too_little_memory_is_an_overload(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    if where == "decoder":
        monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    else:
        monkeypatch.setattr("service.engines.fake._looked_at", fails)
    async with running() as started:
        error = await failure(started.stub.RunTask(run_request(images=[image_bytes()]), timeout=60))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert "memory" in error.message
    assert not error.fields
    assert error.retry_after_s


async def test_the_text_of_torch_without_memory_is_known() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(2**62, dtype=torch.uint8)


async def test_a_turned_image_takes_the_tokens_of_the_upright_one(server: Running) -> None:
    ramp = np.linspace(0, 255, 300 * 90 * 3, dtype=np.uint8).reshape(90, 300, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    usages = []
    for pixels, options in ((ramp, {"exif": exif}), (np.rot90(ramp, -1), {})):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", **options)
        request = run_request(inline("Answer.", choice=["yes"]), [file.getvalue()], max_tokens=64)
        usages.append((await server.stub.RunTask(request, timeout=60)).result.usage)
    assert usages[0] == usages[1]
    assert usages[0].image_tokens > 0
