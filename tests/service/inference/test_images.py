"""Safe decoding: what is accepted looks right, what is not is refused with its own reason."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import struct
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lmdeploy_ext.images.files import ImageLimits
from lmdeploy_ext.images.headers import MAX_JPEG_SCANS
from service.engines.common.reducing import reduce_all
from service.errors import ImageError
from service.inference import decoding
from service.inference.calls import EncodedImage
from service.inference.decoding import ImageDecoder
from service.inference.images import decode_image

LIMITS = ImageLimits()
PHOTOS = Path(__file__).parents[4] / "shared" / "images"


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, x * 0 + 90], 2).astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decode(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    pixels = decode_image(data, "images[0].data", limits)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    return pixels


def refused(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "images[0].data", limits)
    assert caught.value.violations[0].field == "images[0].data"
    return caught.value


VALID = {
    "jpeg": encoded(gradient(), "JPEG"),
    "progressive": encoded(gradient(), "JPEG", progressive=True),
    "png": encoded(gradient(), "PNG"),
    "palette": encoded(gradient().quantize(16), "PNG"),
    "webp": encoded(gradient(), "WEBP"),
    "lossless": encoded(gradient(), "WEBP", lossless=True),
    "alpha": encoded(gradient().convert("RGBA"), "WEBP"),
}


@pytest.mark.parametrize("name", VALID)
def test_accepted_formats_give_what_the_decoder_gives(name: str) -> None:
    reference = Image.open(io.BytesIO(VALID[name])).convert("RGB")
    assert np.array_equal(decode(VALID[name]), np.asarray(reference))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PDF", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    error = refused(encoded(gradient(), kind))
    assert error.reason == "IMAGE_FORMAT_UNSUPPORTED"
    assert "JPEG, PNG and WebP" in error.message


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\x89PN", b"\xff\xd8", b"RIFF", b"/etc/x"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    assert refused(data).reason == "IMAGE_FORMAT_UNSUPPORTED"


def test_no_bytes() -> None:
    assert refused(b"").reason == "IMAGE_EMPTY"


def test_too_many_bytes() -> None:
    size = len(VALID["png"])
    assert decode(VALID["png"], ImageLimits(max_bytes=size)).shape == (24, 40, 3)
    error = refused(VALID["png"], ImageLimits(max_bytes=size - 1))
    assert error.reason == "IMAGE_TOO_LARGE"
    assert error.metadata == {"limit": str(size - 1), "actual": str(size)}


@pytest.mark.parametrize("name", VALID)
def test_pixels_sides_and_ratio_are_limited(name: str) -> None:
    data = VALID[name]
    decode(data, ImageLimits(max_pixels=960, min_side=24, max_aspect_ratio=40 / 24))
    pixels = refused(data, ImageLimits(max_pixels=959))
    assert pixels.reason == "IMAGE_TOO_MANY_PIXELS"
    assert pixels.metadata == {"limit": "959", "actual": "960"}
    small = refused(data, ImageLimits(min_side=25))
    assert small.reason == "IMAGE_TOO_SMALL"
    assert small.metadata == {"limit": "25", "actual": "24"}
    narrow = refused(data, ImageLimits(max_aspect_ratio=1.5))
    assert narrow.reason == "IMAGE_ASPECT_RATIO"
    assert narrow.metadata == {"limit": "1.5", "actual": "1.7"}


def test_the_default_aspect_ratio_is_200() -> None:
    decode(encoded(Image.new("RGB", (200, 1)), "PNG"))
    assert refused(encoded(Image.new("RGB", (201, 1)), "PNG")).reason == "IMAGE_ASPECT_RATIO"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    webp = bytearray(encoded(gradient(), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16383 - 1 | (16383 - 1) << 14)
    jpeg = bytearray(VALID["jpeg"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    for data in (bomb_png(50_000, 50_000), bytes(webp), bytes(jpeg)):
        assert refused(data).reason == "IMAGE_TOO_MANY_PIXELS"


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each scan is a few bytes of the file and a pass over the whole image for the decoder."""
    data = VALID["progressive"]
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    room = MAX_JPEG_SCANS - data.count(b"\xff\xda")
    assert room > 80
    assert decode(data[:end] + data[last:end] * room + data[end:]).shape == (24, 40, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    error = refused(data[:end] + data[last:end] * (room + 1) + data[end:])
    assert error.reason == "IMAGE_INVALID"
    assert "scans" in error.message


def test_pillows_global_limits_and_warnings_have_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(VALID["png"]).shape == (24, 40, 3)


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("lenient", [False, True])
def test_every_truncated_file_is_refused(
    name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDeploy switches Pillow's leniency on for the whole process."""
    whole = decode(VALID[name])
    data = VALID[name]
    reasons = set()
    for length in range(20, len(data), 7):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        try:
            assert np.array_equal(decode(data[:length]), whole)
        except ImageError as error:
            reasons.add(error.reason)
    assert reasons == {"IMAGE_TRUNCATED"}


def test_a_damaged_file_is_refused_without_the_decoders_message() -> None:
    data = bytearray(VALID["png"])
    data[data.index(b"IDAT") + 8] ^= 0xFF
    error = refused(bytes(data))
    assert error.reason == "IMAGE_INVALID"
    assert error.message == "images[0].data: is damaged and cannot be decoded"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    upright: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    assert np.array_equal(decode(data), upright[orientation](stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # the library warns, and goes on
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    data = encoded(gradient(), "JPEG", exif=exif)
    assert np.array_equal(decode(data), decode(VALID["jpeg"]))


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (10, 20, 30, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))
    assert decode(encoded(image, "PNG")).tolist() == [[[255] * 3, [204] * 3]]
    assert decode(encoded(image, "WEBP", lossless=True)).tolist()[0][0] == [255] * 3
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(encoded(grey, "PNG")).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_palette(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=transparency)
    assert decode(data).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_transparent_colour() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    data = encoded(image, "PNG", transparency=(1, 2, 3))
    assert decode(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_sixteen_bits_with_a_transparent_value() -> None:
    data = encoded(Image.fromarray(np.array([[257, 514]], np.uint16)), "PNG")
    end = data.index(b"IDAT") - 4
    data = data[:end] + png_chunk(b"tRNS", struct.pack(">H", 257)) + data[end:]
    assert decode(data)[0, :, 0].tolist() == [255, 2]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(mode: str) -> None:
    image = Image.new(mode, (3, 2), 255)
    assert (decode(encoded(image, "PNG")) == 255).all()


def test_cmyk_is_not_a_negative() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = decode(encoded(red, "JPEG", quality=95))[8, 8]
    assert np.abs(pixel.astype(int) - (255, 0, 0)).max() < 15


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == (255, 0, 0)).all()


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(VALID)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 40),
)
def test_mutated_files_give_pixels_or_an_image_error(
    name: str, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(VALID[name])
    for at, value in edits:
        data[at % len(data)] = value
    with contextlib.suppress(ImageError):
        decode(bytes(data[: len(data) - cut]), ImageLimits(max_pixels=1_000_000))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the folder of photographs is not there")
def test_photographs() -> None:
    for path in sorted(PHOTOS.iterdir()):
        pixels = decode(path.read_bytes())
        with Image.open(path) as reference:
            if reference.mode == "RGB" and "exif" not in reference.info:
                assert np.array_equal(pixels, np.asarray(reference)), path.name


def test_a_plain_jpeg_is_decoded_once_and_never_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("convert", "draft", "transpose", "copy", "getexif", "thumbnail", "crop"):
        monkeypatch.setattr(Image.Image, method, lambda *_, **__: pytest.fail("extra work"))
    assert decode(VALID["jpeg"]).shape == (24, 40, 3)


def decoder(max_decoding_bytes: int = 1 << 30, limits: ImageLimits = LIMITS) -> ImageDecoder:
    return ImageDecoder(limits, max_decoding_bytes)


def as_sent(*images: bytes) -> list[EncodedImage]:
    return [EncodedImage(f"images[{i}].data", data) for i, data in enumerate(images)]


async def pixels_of(*images: bytes) -> list[np.ndarray]:
    opened = await decoder().open(as_sent(*images))
    return await reduce_all(opened, lambda index, image, pixels: pixels)


async def test_many_are_decoded_in_order_off_the_event_loop() -> None:
    images = [encoded(gradient(10 + i, 8), "PNG") for i in range(8)]
    assert [p.shape[1] for p in await pixels_of(*images)] == list(range(10, 18))
    assert await pixels_of() == []


@pytest.mark.parametrize(
    ("count", "more", "inline"), [(4, 0, True), (5, 0, False), (3, 50_000, False)]
)
async def test_few_small_headers_are_read_on_the_event_loop(
    count: int, more: int, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is made to take long takes milliseconds for its size."""
    submitted: list[object] = []

    class Threads(ThreadPoolExecutor):
        def submit(self, *args: Any, **options: Any) -> Any:
            submitted.append(args)
            return super().submit(*args, **options)

    with Threads(1) as threads:
        monkeypatch.setattr(decoding, "_HEADERS", threads)
        await decoder().open(as_sent(*[VALID["png"] + bytes(more)] * count))
    assert (not submitted) is inline


async def test_the_first_bad_image_is_named() -> None:
    with pytest.raises(ImageError) as caught:
        await pixels_of(VALID["png"], b"x", b"")
    assert caught.value.violations[0].field == "images[1].data"
    with pytest.raises(ImageError) as caught:
        await pixels_of(VALID["png"], VALID["jpeg"][:-100], VALID["png"][:-50])
    assert caught.value.violations[0].field == "images[1].data"


async def test_an_error_keeps_no_pixels_in_memory() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def fails(index: int, image: Any, pixels: np.ndarray) -> None:
        alive.append(weakref.ref(pixels))
        try:
            raise ValueError
        except ValueError:
            raise ImageError("images[0].data", "cannot be used") from None

    opened = await decoder().open(as_sent(VALID["png"], VALID["png"]))
    gc.disable()
    try:
        with pytest.raises(ImageError) as caught:
            await reduce_all(opened, fails)
        assert caught.value.violations
        assert [one() for one in alive] == [None] * len(alive)
    finally:
        gc.enable()


async def test_cancellation_drops_images_that_are_not_being_decoded() -> None:
    loop, gate, first, begun = asyncio.get_running_loop(), threading.Event(), asyncio.Event(), []

    def hold(index: int, image: Any, pixels: np.ndarray) -> None:
        begun.append(index)
        loop.call_soon_threadsafe(first.set)
        gate.wait(60)

    one = decoder()
    opened = await one.open(as_sent(*[VALID["png"]] * 5))
    decoding = asyncio.create_task(reduce_all(opened, hold))
    await first.wait()
    decoding.cancel()
    await asyncio.sleep(0.01)
    assert one.memory.held > 0, "a decoder that still runs holds its memory"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await decoding
    assert len(begun) <= 2
    assert one.memory.held == one.memory.waiting == 0


async def test_a_second_cancellation_frees_nothing_while_the_decoder_runs() -> None:
    loop, gate, begun = asyncio.get_running_loop(), threading.Event(), asyncio.Event()

    def hold(rows: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        gate.wait(60)

    one = decoder()
    (opened,) = await one.open(as_sent(VALID["png"]))
    decoding = asyncio.create_task(opened.reduced(hold))
    try:
        await begun.wait()
        for _ in range(3):
            decoding.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not decoding.done()
            assert one.memory.held > 0
    finally:
        gate.set()
    with pytest.raises(asyncio.CancelledError):
        await decoding
    assert one.memory.held == one.memory.waiting == 0
