"""Waits for work, but not after the engine is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from service.errors import EngineUnavailable

T = TypeVar("T")


async def or_closed(work: Awaitable[T], closing: asyncio.Event) -> T:
    """Await the work and return its result. The work is cancelled when the engine closes first.

    Raises:
        EngineUnavailable: the engine is closed.
    """
    task = asyncio.ensure_future(work)
    closed = asyncio.ensure_future(closing.wait())
    try:
        await asyncio.wait({task, closed}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise closed_error()
    finally:
        closed.cancel()
        task.cancel()
        # A task references its exception, whose traceback references this frame. Breaking the cycle
        # frees all frames at once, with everything that they reference.
        del task


def closed_error() -> EngineUnavailable:
    """The error of every call to a closed engine."""
    return EngineUnavailable("the engine is closed", reason="ENGINE_CLOSED")
