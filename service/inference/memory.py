"""A memory budget with a queue, of which a share is reserved for small amounts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.deadlines import Deadline
from service.errors import InferenceTimeout, Overloaded
from service.fairness import FairQueue
from service.quotas import ANONYMOUS

SMALL_DIVISOR = 8
"""An amount is small if it is at most this fraction of the budget."""
RESERVED_DIVISOR = 4
"""The fraction of the budget that is reserved for small amounts."""
RETRY_AFTER_S = 2.0


@dataclass(slots=True, eq=False)
class _Waiting:
    amount: int
    caller: str
    turn: asyncio.Future[None]


class MemoryBudget:
    """Limits the number of bytes in use at the same time. Not thread-safe: belongs to one event
    loop.

    The rule: a quarter of the budget is for small amounts (up to an eighth of the budget) alone, so
    they never wait for large ones. They may use the rest too, as long as no large amount waits for
    it, so large ones are not starved. Among small and among large amounts callers take turns, as
    in `FairQueue`. An amount above ``largest``, three
    quarters of the budget, is served when no other large one is.

    limit: bytes. max_waiting: bytes of amounts that wait; None means no bound.
    """

    def __init__(self, limit: int, max_waiting: int | None = None) -> None:
        self.limit = limit
        self._max_waiting = max_waiting
        self._reserved = limit // RESERVED_DIVISOR
        self._small = self._large = 0
        self.waiting = 0
        """Sum of the waiting amounts, in bytes."""
        self._waiting_small: FairQueue[_Waiting] = FairQueue()
        self._waiting_large: FairQueue[_Waiting] = FairQueue()

    @property
    def held(self) -> int:
        """Bytes in use."""
        return self._small + self._large

    @property
    def largest(self) -> int:
        """The largest amount, in bytes, for which the budget is never exceeded."""
        return self.limit - self._reserved

    def is_large(self, amount: int) -> bool:
        """Whether an amount counts as large."""
        return amount > self.limit // SMALL_DIVISOR

    @asynccontextmanager
    async def hold(
        self, amount: int, deadline: Deadline | None = None, caller: str = ANONYMOUS.name
    ) -> AsyncIterator[None]:
        """Hold an amount during the body; waits for it until ``deadline``.

        Raises ``Overloaded`` if too many bytes wait already, ``InferenceTimeout`` at the deadline.
        """
        await self._acquire(amount, deadline, caller)
        try:
            yield
        finally:
            self._give_back(amount, caller)

    async def _acquire(self, amount: int, deadline: Deadline | None, caller: str) -> None:
        queue = self._queue(amount)
        if not queue and self._fits(amount):
            self._take(amount)
            queue.hold(caller)
            return
        if not self._has_room(amount, caller):
            raise _full()
        loop = asyncio.get_running_loop()
        one = _Waiting(amount, caller, loop.create_future())
        queue.put(caller, one)
        self.waiting += amount
        timer = None if deadline is None else loop.call_at(deadline.at, self._expire, one)
        try:
            await one.turn
        except asyncio.CancelledError:
            if queue.discard(caller, one):
                self.waiting -= amount
                self._admit()  # amounts that waited behind it may fit now
            elif one.turn.done() and not one.turn.cancelled() and one.turn.exception() is None:
                # The memory was assigned in the same turn in which the call ended.
                self._give_back(amount, caller)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _has_room(self, amount: int, caller: str) -> bool:
        """Whether an amount may wait; those of callers with more waiting amounts make room for it."""
        if self._max_waiting is None:
            return True
        queue, free = self._queue(amount), self._max_waiting - self.waiting
        taken: list[_Waiting] = []
        while free < amount:
            one = queue.make_room(caller)
            if one is None:
                for kept in reversed(taken):  # to where they were: they need not make room in vain
                    queue.put(kept.caller, kept)
                return False
            taken.append(one)
            free += one.amount
        for one in taken:
            self.waiting -= one.amount
            if not one.turn.done():
                one.turn.set_exception(_full())
        return True

    def _give_back(self, amount: int, caller: str) -> None:
        if self.is_large(amount):
            self._large -= amount
        else:
            self._small -= amount
        self._queue(amount).give_back(caller)
        self._admit()

    def _queue(self, amount: int) -> FairQueue[_Waiting]:
        return self._waiting_large if self.is_large(amount) else self._waiting_small

    def _fits(self, amount: int) -> bool:
        borrowed = max(0, self._small - self._reserved)
        shared = self.limit - self._reserved
        if self.is_large(amount):
            free = self._large + borrowed + amount <= shared
            return free or not (self._large or borrowed)
        if self._small + amount <= self._reserved:
            return True
        return not self._waiting_large and self.held + amount <= self.limit

    def _take(self, amount: int) -> None:
        if self.is_large(amount):
            self._large += amount
        else:
            self._small += amount

    def _admit(self) -> None:
        """Serve the waiting amounts that fit, in order, large amounts first, because they wait
        longer."""
        for queue in (self._waiting_large, self._waiting_small):
            while queue and self._fits(queue.peek().amount):
                _, one = queue.take()
                self.waiting -= one.amount
                if one.turn.done():
                    queue.give_back(one.caller)
                else:
                    self._take(one.amount)
                    one.turn.set_result(None)

    def _expire(self, one: _Waiting) -> None:
        if not one.turn.done():
            self._queue(one.amount).discard(one.caller, one)
            self.waiting -= one.amount
            one.turn.set_exception(
                InferenceTimeout(
                    "The deadline passed while the call waited for memory for its images."
                )
            )
            self._admit()


def _full() -> Overloaded:
    return Overloaded(
        "The images of other calls use all the memory that the server has for images.",
        retry_after_s=RETRY_AFTER_S,
    )
