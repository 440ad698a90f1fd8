"""Waiting for something, but not longer than the engine lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from service.errors import EngineUnavailable

T = TypeVar("T")


async def or_closed(work: Awaitable[T], closing: asyncio.Event) -> T:
    """The result of the work, which is cancelled when the engine closes first.

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
        # A task holds its error, whose traceback holds this frame: without a cycle all of it is freed
        # at once, and with it whatever the frames below hold.
        del task


def closed_error() -> EngineUnavailable:
    """What every call gets from an engine that is closed."""
    return EngineUnavailable("the engine is closed", reason="ENGINE_CLOSED")
