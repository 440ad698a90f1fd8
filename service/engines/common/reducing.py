"""Asks for the pixels of the images of one request, a few images at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from service.types import ImageSource

if TYPE_CHECKING:
    from service.types import Pixels

T = TypeVar("T")

AT_ONCE = 2
"""Images of one request that are decoded, or wait for it, at the same time. Few, so that a request
with many images does not stand before the others."""


async def reduce_all(
    images: Sequence[ImageSource], reduce: Callable[[int, ImageSource, Pixels], T]
) -> list[T]:
    """``reduce(index, image, pixels)`` of every image, in order.

    Raises the error of the first image that cannot be used; the images behind it are left alone.
    Nothing runs on when this returns.
    """
    places = asyncio.Semaphore(AT_ONCE)
    failed: list[int] = []

    async def one(index: int, image: ImageSource) -> T | None:
        async with places:
            if failed:
                return None
            try:
                return await image.reduced(partial(reduce, index, image))
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
        del found  # the traceback of an error holds this frame: nothing is to live as long
