"""Deadlines: a time limit for one piece of work, or shared by several."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """A point in time on the event loop's clock, for one wait or several.

    seconds: time from now; negative for a deadline that has passed.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.at - asyncio.get_running_loop().time()

    async def wait(self, work: Awaitable[T], late: Callable[[], Exception]) -> T:
        """Await the work and return its result. At the deadline the work is cancelled and the error
        that ``late`` returns is raised.

        An ``asyncio.TimeoutError`` that the work itself raises is passed on.
        """
        if sys.version_info >= (3, 11):
            limit = asyncio.timeout_at(self.at)
            try:
                async with limit:  # in this task; wait_for would start another task
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
