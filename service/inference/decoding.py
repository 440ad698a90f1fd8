"""Decodes the images of all calls outside the event loop, with separate threads for large images.

An image is stored encoded until an engine asks for its pixels. One thread then decodes and resizes
it, so that the full-size image only exists while this thread works on it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TypeVar

from lmdeploy_ext.images.files import THREADS, ImageLimits, decoding_bytes
from lmdeploy_ext.images.headers import Header, check_complete, reads_quickly
from service.errors import ImageError, ServiceError
from service.inference.images import (
    check_header,
    check_request_pixels,
    decode,
    out_of_memory,
    reported,
)
from service.inference.memory import MemoryBudget
from service.inference.turns import Turns
from service.observation import current
from service.quotas import ANONYMOUS
from service.types import EncodedImage, ImageFile, ImageRows

T = TypeVar("T")

_HEADERS = ThreadPoolExecutor(THREADS, thread_name_prefix="image-header")
_ORDINARY = ThreadPoolExecutor(THREADS, thread_name_prefix="decode-image")
_LARGE = ThreadPoolExecutor(max(1, THREADS // 2), thread_name_prefix="decode-large-image")

INLINE_FILES, INLINE_BYTES = 4, 128 * 1024
"""Files of a request whose headers are read on the event loop, where that is quick, and their size: to wake
a thread takes longer."""
LARGE_PIXELS = 16_000_000
"""Images with more pixels count as large: decoding a PNG file of this size takes a second."""


def _read_quickly(encoded: Sequence[EncodedImage]) -> bool:
    """Whether the headers of a request are read on the event loop."""
    return (
        len(encoded) <= INLINE_FILES
        and sum(len(one.data) for one in encoded) <= INLINE_BYTES
        and all(reads_quickly(one.data) for one in encoded)
    )


class _Lane:
    """The threads for one kind of images. Callers take turns. Only a few images of each request
    wait at the same time, so that the requests of a caller also take turns."""

    def __init__(self, executor: Executor, threads: int) -> None:
        self.executor = executor
        self.turns = Turns(threads)


class ImageDecoder:
    """Reads headers and decodes images within limits. Not thread-safe: belongs to one event loop.

    max_decoding_bytes: maximum memory for decoding, by estimate. An image that needs more than
    three quarters of it is refused. An image that needs more than an eighth of it, or has more than
    ``LARGE_PIXELS``, is large; large images are decoded by separate threads.
    """

    def __init__(self, limits: ImageLimits, max_decoding_bytes: int) -> None:
        self._limits = limits
        self.memory = MemoryBudget(max_decoding_bytes)
        self._ordinary = _Lane(_ORDINARY, THREADS)
        self._large = _Lane(_LARGE, max(1, THREADS // 2))

    @property
    def bounds(self) -> tuple[ImageLimits, int]:
        """The limits of images, and the maximum memory for decoding them."""
        return self._limits, self.memory.limit

    async def open(
        self, encoded: Sequence[EncodedImage], caller: str = ANONYMOUS.name
    ) -> list[RequestImage]:
        """Read and check the headers of all images of a request; nothing is decoded.

        caller: the caller that takes turns with other callers. Raises ``ImageError`` for the first
        image that is not accepted, or for all images together.
        """
        if not encoded:
            return []
        if _read_quickly(encoded):
            headers = _value(self._headers(encoded))
        else:
            loop = asyncio.get_running_loop()
            headers = _value(await loop.run_in_executor(_HEADERS, self._headers, encoded))
        return [RequestImage(self, *one, caller) for one in zip(encoded, headers, strict=True)]

    def is_large(self, header: Header) -> bool:
        """Whether an image is decoded by the threads for large images."""
        return header.file_pixels > LARGE_PIXELS or self.memory.is_large(decoding_bytes(header))

    async def decode(
        self,
        encoded: EncodedImage,
        header: Header,
        reduce: Callable[[ImageRows], T],
        needs_bytes: int,
        caller: str,
    ) -> T:
        """Decode an image and return the result of ``reduce``, which is called in the same
        thread."""
        size = decoding_bytes(header) + needs_bytes
        self._check_memory(header, size, encoded.field)
        lane = self._large if self.is_large(header) else self._ordinary
        async with lane.turns.turn(caller), self.memory.hold(size, caller=caller):
            work = lane.executor.submit(_reduced, encoded, header, self._limits, reduce)
            ended = asyncio.wrap_future(work)
            try:
                found = await asyncio.shield(ended)
            except asyncio.CancelledError:
                # A decoder cannot be interrupted, so its memory counts until it has finished.
                if not work.cancel():
                    await _until_done(ended)
                raise
        return _value(found)

    def _headers(self, encoded: Sequence[EncodedImage]) -> list[Header] | ServiceError:
        try:
            headers = [check_header(one.data, one.field, self._limits) for one in encoded]
            check_request_pixels(headers, self._limits)
            for one, header in zip(encoded, headers, strict=True):
                self._check_memory(header, decoding_bytes(header), one.field)
        except ServiceError as error:
            return _bare(error)
        return headers

    def _check_memory(self, header: Header, size: int, field: str) -> None:
        """Refuse an image that would never fit into the budget."""
        if size <= self.memory.largest:
            return
        raise ImageError(
            field,
            f"needs {size} bytes of memory to be decoded ({header.width}x{header.height} "
            f"{header.format}), the server has {self.memory.largest} for an image; send fewer "
            "pixels, or a baseline JPEG or a PNG file, which need the least",
            reason="IMAGE_NEEDS_TOO_MUCH_MEMORY",
            metadata={"limit": str(self.memory.largest), "actual": str(size)},
        )


class RequestImage:
    """An encoded image of a request, with its size; see `service.types.ImageSource`."""

    def __init__(
        self, decoder: ImageDecoder, encoded: EncodedImage, header: Header, caller: str
    ) -> None:
        self._decoder = decoder
        self._caller = caller
        self._encoded = encoded
        self._header = header
        self.width, self.height = header.upright
        self.min_pixels, self.max_pixels = encoded.min_pixels, encoded.max_pixels

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the file, for an engine in another process, which decodes it within the same
        limits. Data from clients is never unpickled."""
        return _received, (self._decoder.bounds, self._encoded, self._header, self._caller)

    @property
    def file_pixels(self) -> int:
        """Pixels of the file as it was sent, whatever the scale at which it is decoded."""
        return self._header.file_pixels

    @property
    def large(self) -> bool:
        """Whether the image is decoded by the threads for large images."""
        return self._decoder.is_large(self._header)

    async def file(self) -> ImageFile:
        """The file as it was received. Raises ``ImageError`` for a truncated file."""
        encoded, header = self._encoded, self._header

        def check() -> None:
            reported(check_complete, encoded.data, header, encoded.field)

        if reads_quickly(encoded.data):
            check()
        else:
            await asyncio.get_running_loop().run_in_executor(_HEADERS, check)
        return ImageFile(encoded.data, header.format, header.plain and header.scale == 1)

    async def reduced(self, reduce: Callable[[ImageRows], T], needs_bytes: int = 0) -> T:
        """Decode the image and return the result of ``reduce``. Raises ``ImageError`` for a damaged
        or truncated file, or for an image that needs more memory than the server has for images."""
        decode = self._decoder.decode
        with current().span("decode image", pixels=self.width * self.height):
            return await decode(self._encoded, self._header, reduce, needs_bytes, self._caller)


@lru_cache(maxsize=16)
def _decoder(limits: ImageLimits, max_decoding_bytes: int) -> ImageDecoder:
    """The decoder of images that come from other processes."""
    return ImageDecoder(limits, max_decoding_bytes)


def _received(
    bounds: tuple[ImageLimits, int], encoded: EncodedImage, header: Header, caller: str
) -> RequestImage:
    return RequestImage(_decoder(*bounds), encoded, header, caller)


async def _until_done(ended: asyncio.Future[T]) -> None:
    """Wait for the end of work that cannot be interrupted, however often the task is cancelled.

    For a task that is being cancelled already: its caller raises that cancellation afterwards.
    """
    while not ended.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([ended])


@contextmanager
def emptied(encoded: Sequence[EncodedImage]) -> Iterator[None]:
    """Release the bytes of images after the body, even if something still references the images,
    such as the traceback of an error."""
    try:
        yield
    finally:
        for one in encoded:
            one.data = b""


def _reduced(
    encoded: EncodedImage, header: Header, limits: ImageLimits, reduce: Callable[[ImageRows], T]
) -> T | ServiceError:
    """Returns an error instead of raising it, because a raised error would keep the frames of this
    thread, with their pixels, in memory."""
    try:
        return reported(reduce, decode(encoded.data, header, encoded.field, limits))
    except ServiceError as error:
        return _bare(error)
    except Exception as error:
        if "allocate memory" in str(error):  # torch's message for a lack of memory
            return out_of_memory()
        traceback.clear_frames(error.__traceback__)
        raise


def _bare(error: ServiceError) -> ServiceError:
    """The error without its cause and context."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _value(found: T | ServiceError) -> T:
    if isinstance(found, ServiceError):
        raise found
    return found
