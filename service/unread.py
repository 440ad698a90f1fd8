"""Answers that nobody reads: when a drain stops waiting for a call, and when the call is dropped.

For all front ends. A front end tells an ``Answer`` when something waits for the caller to read it and
when the caller has read it; what dropping means is up to the front end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from service.lifecycle import Lifecycle

DROP_AFTER_S = 1.0
"""Time after its deadline, in seconds, at which a call is dropped that could not be ended
normally."""
STALL_S = 2.0
"""Time, in seconds, that a message may wait for its reader; after it, a drain no longer waits for
the call."""


class Answer:
    """The answer of one call, on its way to a caller who may not read it. Lives on one event loop.

    lifecycle: is told when the call stalls, and when it moves again.
    call: the asyncio task of the call, as the lifecycle knows it.

    Attributes:
        stalled: whether something waits longer than STALL_S for its reader.
        dropped: whether the call was dropped.
    """

    __slots__ = ("_call", "_dropping", "_lifecycle", "_loop", "_stalling", "dropped", "stalled")

    def __init__(self, lifecycle: Lifecycle, call: asyncio.Task[Any]) -> None:
        self._lifecycle = lifecycle
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._dropping: asyncio.TimerHandle | None = None
        self._stalling: asyncio.TimerHandle | None = None
        self.stalled = self.dropped = False

    def drop_in(self, seconds: float, drop: Callable[[], object]) -> None:
        """Drop the call DROP_AFTER_S after this time limit; replaces an earlier limit.

        drop: ends a call whose answer nobody reads, so that an error could not be sent either.
        """
        self.keep()
        self._dropping = self._loop.call_later(seconds + DROP_AFTER_S, self._dropped, drop)

    def keep(self) -> None:
        """Cancel the time limit: the call may take any time."""
        if self._dropping is not None:
            self._dropping.cancel()
            self._dropping = None

    def waits(self) -> None:
        """Something waits for the caller to read it. No effect where something waits already."""
        if self._stalling is None:
            self._stalling = self._loop.call_later(STALL_S, self._stalled)

    def read(self) -> None:
        """The caller has read what waited."""
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None
            self.stalled = False
            self._lifecycle.move(self._call)

    def close(self) -> None:
        """The call has ended."""
        self.keep()
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def _dropped(self, drop: Callable[[], object]) -> None:
        self._dropping = None
        self.dropped = True
        drop()

    def _stalled(self) -> None:
        self.stalled = True
        self._lifecycle.stall(self._call)
