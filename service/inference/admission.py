"""Bounded concurrency and a bounded queue: what does not fit is refused, with a time to return."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.deadlines import Deadline
from service.errors import InferenceTimeout, Overloaded

SMOOTHING = 0.1
"""Weight of the newest call in the running mean of call times."""
RETRY_MIN_S, RETRY_MAX_S = 0.1, 60.0


class Admission:
    """First come, first served. Lives on one event loop.

    max_concurrent: most calls in work. max_queue: most calls that wait; 0 means no queue.
    """

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queue = max_queue
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0

    @property
    def active(self) -> int:
        """Calls in work."""
        return self._active

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self, deadline: Deadline) -> AsyncIterator[None]:
        """Hold one place for the body, waiting for it until ``deadline``.

        Raises ``Overloaded`` when the queue is full, ``InferenceTimeout`` when the time is over.
        """
        await self._acquire(deadline)
        started = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            took = asyncio.get_running_loop().time() - started
            self._mean_s += SMOOTHING * (took - self._mean_s)
            self._release()

    async def _acquire(self, deadline: Deadline) -> None:
        if self._active < self._max_concurrent:
            self._active += 1
            return
        if len(self._waiting) >= self._max_queue:
            raise Overloaded(
                "The server is busy and its queue is full.", retry_after_s=self._retry_after_s()
            )
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._waiting.append(place)
        timer = loop.call_at(deadline.at, self._expire, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._forget(place)
            elif place.exception() is None:  # given in the same turn in which the call ended
                self._release()
            raise
        finally:
            timer.cancel()

    def _release(self) -> None:
        """Hand the place to the next in the queue, or give it back."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._active -= 1

    def _expire(self, place: asyncio.Future[None]) -> None:
        if not place.done():
            self._forget(place)
            place.set_exception(
                InferenceTimeout("The time was over before the call left the queue of the server.")
            )

    def _forget(self, place: asyncio.Future[None]) -> None:
        if place in self._waiting:
            self._waiting.remove(place)

    def _retry_after_s(self) -> float:
        """When a place in the queue should be free: as soon as one of the calls in work ends."""
        return min(max(self._mean_s / self._max_concurrent, RETRY_MIN_S), RETRY_MAX_S)
