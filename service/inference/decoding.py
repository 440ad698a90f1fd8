"""Decodes the images of all calls beside the event loop, large ones apart from the others.

An image keeps its bytes until an engine asks for its pixels. These are made and reduced in one go, in
one thread, so that an image exists at its full size only while that thread works on it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from service.errors import ServiceError
from service.inference.image_headers import Header
from service.inference.images import (
    THREADS,
    ImageLimits,
    check_header,
    check_request_pixels,
    decode,
    decoding_bytes,
    out_of_memory,
)
from service.inference.memory import MemoryBudget
from service.types import EncodedImage

if TYPE_CHECKING:
    from service.types import Pixels

T = TypeVar("T")

_HEADERS = ThreadPoolExecutor(THREADS, thread_name_prefix="image-header")
_ORDINARY = ThreadPoolExecutor(THREADS, thread_name_prefix="decode-image")
_LARGE = ThreadPoolExecutor(max(1, THREADS // 2), thread_name_prefix="decode-large-image")


@dataclass(slots=True)
class _Lane:
    """Threads for one kind of images. Waiting images take turns, first come, first served; of one
    request only few wait at the same time, so that requests share the lane."""

    executor: Executor
    turns: asyncio.Semaphore


class ImageDecoder:
    """Reads headers and decodes images within limits. Lives on one event loop.

    max_decoding_bytes: most memory that decoding takes at the same time, by estimate. An image that
    needs more than an eighth of it is large: large images have threads of their own.
    """

    def __init__(self, limits: ImageLimits, max_decoding_bytes: int) -> None:
        self._limits = limits
        self.memory = MemoryBudget(max_decoding_bytes)
        self._ordinary = _Lane(_ORDINARY, asyncio.Semaphore(THREADS))
        self._large = _Lane(_LARGE, asyncio.Semaphore(max(1, THREADS // 2)))

    async def open(self, encoded: Sequence[EncodedImage]) -> list[RequestImage]:
        """Read and check the headers of all images of a request; nothing is decoded.

        Raises ``ImageError`` for the first image that is not accepted, or for all together.
        """
        if not encoded:
            return []
        loop = asyncio.get_running_loop()
        headers = _value(await loop.run_in_executor(_HEADERS, self._headers, encoded))
        return [RequestImage(self, *one) for one in zip(encoded, headers, strict=True)]

    def is_large(self, header: Header) -> bool:
        """Whether an image goes to the lane of large ones."""
        return self.memory.is_large(decoding_bytes(header))

    async def decode(
        self, data: bytes, header: Header, field: str, reduce: Callable[[Pixels], T]
    ) -> T:
        """``reduce`` of the pixels, called in the thread that decoded them."""
        size = decoding_bytes(header)
        lane = self._large if self.memory.is_large(size) else self._ordinary
        async with lane.turns, self.memory.hold(size):
            work = lane.executor.submit(_reduced, data, header, field, reduce)
            ended = asyncio.wrap_future(work)
            try:
                found = await asyncio.shield(ended)
            except asyncio.CancelledError:
                # A decoder cannot be interrupted: its memory counts until it has come to its end.
                if not work.cancel():
                    await asyncio.wait([ended])
                raise
        return _value(found)

    def _headers(self, encoded: Sequence[EncodedImage]) -> list[Header] | ServiceError:
        try:
            headers = [check_header(one.data, one.field, self._limits) for one in encoded]
            check_request_pixels(headers, self._limits)
        except ServiceError as error:
            return _bare(error)
        return headers


class RequestImage:
    """An image of a request as it came, with its size; see `service.types.ImageSource`."""

    def __init__(self, decoder: ImageDecoder, encoded: EncodedImage, header: Header) -> None:
        self._decoder = decoder
        self._encoded = encoded
        self._header = header
        self.width, self.height = header.upright
        self.min_pixels, self.max_pixels = encoded.min_pixels, encoded.max_pixels

    @property
    def large(self) -> bool:
        """Whether it is decoded in the lane of large images."""
        return self._decoder.is_large(self._header)

    async def reduced(self, reduce: Callable[[Pixels], T]) -> T:
        """``reduce`` of the pixels. Raises ``ImageError`` where the file is damaged or cut."""
        encoded = self._encoded
        return await self._decoder.decode(encoded.data, self._header, encoded.field, reduce)


@contextmanager
def emptied(encoded: Sequence[EncodedImage]) -> Iterator[None]:
    """Let go of the bytes of images behind the body, whoever still holds the images themselves:
    the traceback of an error does."""
    try:
        yield
    finally:
        for one in encoded:
            one.data = b""


def _reduced(
    data: bytes, header: Header, field: str, reduce: Callable[[Pixels], T]
) -> T | ServiceError:
    """An error is returned: raised, it would hold the frames of this thread, and their pixels."""
    try:
        return reduce(decode(data, header, field))
    except ServiceError as error:
        return _bare(error)
    except MemoryError:
        return out_of_memory()
    except Exception as error:
        if "allocate memory" in str(error):  # as torch says it
            return out_of_memory()
        traceback.clear_frames(error.__traceback__)
        raise


def _bare(error: ServiceError) -> ServiceError:
    """The error without what it was raised from."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _value(found: T | ServiceError) -> T:
    if isinstance(found, ServiceError):
        raise found
    return found
