"""Places that callers take in turns, so that many images of one do not stand before another's few."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.fairness import FairQueue


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
            self._release(caller)

    async def _acquire(self, caller: str) -> None:
        if self._free:
            self._free -= 1
            self._waiting.hold(caller)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(caller, place)
        try:
            await place
        except asyncio.CancelledError:
            waited = self._waiting.discard(caller, place)
            if not waited and not place.cancelled():
                self._release(caller)  # given in the same turn in which the call ended
            raise

    def _release(self, caller: str) -> None:
        self._waiting.give_back(caller)
        while self._waiting:
            following, place = self._waiting.take()
            if not place.done():
                place.set_result(None)
                return
            self._waiting.give_back(following)
        self._free += 1
