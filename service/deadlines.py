"""A time limit on one await."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def wait_until(work: Awaitable[T], at: float) -> T:
    """The result of ``work``; when the event loop's clock passes ``at`` first, it is cancelled.

    Raises ``asyncio.TimeoutError`` then.
    """
    if sys.version_info >= (3, 11):
        async with asyncio.timeout_at(at):  # runs in this task; wait_for makes one of its own
            return await work
    left_s = at - asyncio.get_running_loop().time()
    return await asyncio.wait_for(work, max(left_s, 0.0))
