"""Keeps the work on large messages off the event loop.

Parsing a message of 57 MB and copying its images holds the GIL for tens of milliseconds each time. On the
event loop, the messages of many calls would be worked on in one go, and health checks would wait for all
of them. In a thread, the event loop goes on between two messages, and between two images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE_BYTES = 256 * 1024
"""Size above which a message is worked on in the thread: below, the change of threads costs more."""
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="large-message")
"""One thread: with two, the event loop would wait for both of them."""


async def off_loop(size: int, work: Callable[..., T], *arguments: object) -> T:
    """The result of ``work(*arguments)``, which takes its time with ``size`` bytes."""
    if size <= LARGE_BYTES:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_LARGE, work, *arguments)
