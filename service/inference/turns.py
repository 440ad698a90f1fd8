"""Who is next: callers take turns, so that many requests of one do not stand before another's few."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items that wait, each for a caller. Callers take turns; the items of one are in order."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[T]] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        for items in self._of.values():
            yield from items

    def __bool__(self) -> bool:
        return bool(self._of)

    def append(self, caller: str, item: T) -> None:
        """Let an item wait behind those of its caller."""
        self._of.setdefault(caller, deque()).append(item)

    @property
    def first(self) -> T:
        """The item that is next. There has to be one."""
        return next(iter(self._of.values()))[0]

    def pop(self) -> T:
        """Take the item that is next; its caller then stands behind the others."""
        caller, items = next(iter(self._of.items()))
        item = items.popleft()
        self._of.move_to_end(caller)
        if not items:
            del self._of[caller]
        return item

    def remove(self, caller: str, item: T) -> bool:
        """Take an item out of the queue. Returns False where it does not wait any more."""
        items = self._of.get(caller)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._of[caller]
        return True


class Turns:
    """A number of places that callers take in turns. Lives on one event loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Hold one place for the body, waiting for it."""
        await self._acquire(caller)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, caller: str) -> None:
        if self._free:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(caller, place)
        try:
            await place
        except asyncio.CancelledError:
            waited = self._waiting.remove(caller, place)
            if not waited and not place.cancelled():
                self._release()  # given in the same turn in which the call ended
            raise

    def _release(self) -> None:
        while self._waiting:
            place = self._waiting.pop()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
