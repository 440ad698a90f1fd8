"""A moment up to which work may last."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """A moment by the event loop's clock, for one wait or for several.

    seconds: from now; negative when the moment has passed.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float:
        """Seconds from now; negative when the moment has passed."""
        return self.at - asyncio.get_running_loop().time()

    async def wait(self, work: Awaitable[T], late: Callable[[], Exception]) -> T:
        """The result of the work. When the moment comes first, the work is cancelled and the error
        that ``late`` makes is raised.

        An ``asyncio.TimeoutError`` of the work itself comes through.
        """
        if sys.version_info >= (3, 11):
            limit = asyncio.timeout_at(self.at)
            try:
                async with limit:  # runs the work in this task; wait_for makes one of its own
                    return await work
            except asyncio.TimeoutError:
                if not limit.expired():
                    raise
                raise late() from None
            finally:
                del limit  # through its task it would keep this frame, and with it the request
        try:
            return await asyncio.wait_for(work, max(self.left_s, 0.0))
        except asyncio.TimeoutError:
            if self.left_s > 0:
                raise
            raise late() from None
