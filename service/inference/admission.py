"""Limits the number of running and waiting calls; further calls are refused and told when to retry."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.deadlines import Deadline
from service.errors import InferenceTimeout, Overloaded
from service.fairness import FairQueue
from service.quotas import ANONYMOUS, Caller, exceeded

SMOOTHING = 0.1
"""Weight of the newest call in the moving average of call times."""
RETRY_MIN_S, RETRY_MAX_S = 0.1, 60.0
"""The shortest and the longest time to return that a caller is told."""
SPREAD = 0.25
"""Share by which times to return differ at random, up and down."""
ROOM_FACTOR = 7
"""Without a queue, a caller gets a further slot only if it holds fewer than 7 times the free slots. So
one caller alone gets at most 7/8 of the slots."""
FULL = "The server is busy and its queue is full."

jitter = random.Random()


class Admission:
    """Assigns slots fairly to callers; see ``FairQueue``. Not thread-safe: belongs to one event
    loop.

    max_concurrent: maximum number of running calls.
    max_queue: maximum number of waiting calls; 0 means no queue.
    When the queue is full, a call of a caller with few waiting calls replaces the newest call of
    the caller with the most waiting calls.
    """

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queue = max_queue
        self._active = 0
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._mean_s = 1.0

    @property
    def active(self) -> int:
        """Calls in work."""
        return self._active

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._queue)

    @property
    def retry_after_s(self) -> float:
        """Seconds until all waiting calls should have slots; a call that is refused now should retry
        then.

        The random factor spreads the retries of callers that were refused at the same time, also
        where the time is the shortest or the longest: from ``RETRY_MIN_S`` to ``RETRY_MAX_S``.
        """
        drained_s = (len(self._queue) + 1) * self._mean_s / self._max_concurrent
        mean_s = min(max(drained_s, RETRY_MIN_S / (1 - SPREAD)), RETRY_MAX_S / (1 + SPREAD))
        return mean_s * jitter.uniform(1 - SPREAD, 1 + SPREAD)

    @asynccontextmanager
    async def slot(self, deadline: Deadline, caller: Caller = ANONYMOUS) -> AsyncIterator[None]:
        """Hold one slot during the body; waits for the slot until ``deadline``.

        Raises ``Overloaded`` when the queue is full, ``QuotaExceeded`` when too many calls of the
        caller wait, ``InferenceTimeout`` at the deadline.
        """
        await self._acquire(deadline, caller)
        started = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            took = asyncio.get_running_loop().time() - started
            self._mean_s += SMOOTHING * (took - self._mean_s)
            self._release(caller)

    async def _acquire(self, deadline: Deadline, caller: Caller) -> None:
        if self._active < self._max_concurrent and self._leaves_room(caller):
            self._active += 1
            self._queue.hold(caller.name)
            return
        self._check_queue(caller)
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._queue.put(caller.name, place)
        timer = loop.call_at(deadline.at, self._expire, place, caller)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._queue.discard(caller.name, place)
            elif place.exception() is None:
                # The slot was given in the same turn of the event loop as the cancellation.
                self._release(caller)
            raise
        finally:
            timer.cancel()

    def _leaves_room(self, caller: Caller) -> bool:
        """Whether the caller may have one more slot. With a queue, its order ensures
        fairness."""
        if self._max_queue or caller == ANONYMOUS:
            return True
        return self._queue.held(caller.name) < ROOM_FACTOR * (self._max_concurrent - self._active)

    def _check_queue(self, caller: Caller) -> None:
        """Raise the error of a call that may not wait."""
        limit = None if caller.quota is None else caller.quota.queue
        if limit is not None and self._queue.waiting(caller.name) >= limit:
            raise exceeded("queue", limit, self.retry_after_s)
        if len(self._queue) < self._max_queue:
            return
        last = self._queue.make_room(caller.name)
        if last is None:
            raise Overloaded(FULL, retry_after_s=self.retry_after_s)
        if not last.done():
            last.set_exception(Overloaded(FULL, retry_after_s=self.retry_after_s))

    def _release(self, caller: Caller) -> None:
        """Assign the slot to the next call in the queue, or free it."""
        self._queue.give_back(caller.name)
        while self._queue:
            name, place = self._queue.take()
            if not place.done():
                place.set_result(None)
                return
            self._queue.give_back(name)
        self._active -= 1

    def _expire(self, place: asyncio.Future[None], caller: Caller) -> None:
        if not place.done():
            self._queue.discard(caller.name, place)
            place.set_exception(
                InferenceTimeout(
                    "The deadline passed while the call waited in the queue of the server."
                )
            )
