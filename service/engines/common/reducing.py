"""Decodes the images of one request, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from service.types import ImageRows, ImageSource

T = TypeVar("T")

AT_ONCE = 2
"""Maximum number of images of one request that are decoded, or wait for decoding, at the same time.
A small number, so that a request with many images does not delay the others."""


async def reduce_all(
    images: Sequence[ImageSource],
    reduce: Callable[[int, ImageSource, ImageRows], T],
    needs_bytes: Callable[[ImageSource], int] = lambda _: 0,
) -> list[T]:
    """Call ``reduce(index, image, rows)`` for every image; returns the results in order.

    needs_bytes: memory that the reduction of an image takes beside the image.
    Raises the error of the first image that cannot be used; later images are not decoded. No work
    is left running when this function returns.
    """
    places = asyncio.Semaphore(AT_ONCE)
    failed: list[int] = []

    async def one(index: int, image: ImageSource) -> T | None:
        async with places:
            if failed:
                return None
            try:
                return await image.reduced(partial(reduce, index, image), needs_bytes(image))
            except Exception:
                failed.append(index)
                raise

    found: list[T | BaseException | None] = await asyncio.gather(
        *(one(index, image) for index, image in enumerate(images)), return_exceptions=True
    )
    try:
        if failed:
            raise next(result for result in found if isinstance(result, BaseException))
        return found  # type: ignore[return-value]  # without a failure there is one result each
    finally:
        del found  # the traceback of an error references this frame: drop references
