"""The phase of the server (loading, serving, unhealthy, draining) and its calls in flight."""

from __future__ import annotations

import asyncio
import enum
from typing import Any

from service.errors import EngineUnavailable


class Phase(enum.Enum):
    """The phase of a server; calls are accepted only in SERVING."""

    LOADING = "loading"
    SERVING = "serving"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


REFUSALS = {
    Phase.LOADING: ("ENGINE_LOADING", "The model is loading. Try again later."),
    Phase.UNHEALTHY: ("ENGINE_UNHEALTHY", "The engine does not make progress. Try again later."),
    Phase.DRAINING: ("ENGINE_DRAINING", "The server is stopping. Try again on another one."),
}


class Lifecycle:
    """The phase of one server and its calls in flight. Lives on one event loop."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self._calls: set[asyncio.Task[Any]] = set()
        self._stalled: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurry = asyncio.Event()

    @property
    def calls_in_flight(self) -> int:
        """Calls that were admitted and have not ended."""
        return len(self._calls)

    @property
    def cutting(self) -> bool:
        """Whether the drain's grace period is over. If true, a cancellation comes from the server, not
        from the caller."""
        return self.phase is Phase.DRAINING and self._hurry.is_set()

    def refusal(self) -> EngineUnavailable | None:
        """The error for a new call in the current phase; None while calls are accepted."""
        if self.phase is Phase.SERVING:
            return None
        reason, message = REFUSALS[self.phase]
        return EngineUnavailable(message, reason=reason)

    def enter(self, call: asyncio.Task[Any]) -> None:
        """Count a call as in flight until its asyncio task ends.

        Raises ``EngineUnavailable`` when the phase does not accept calls.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        self._calls.add(call)
        self._idle.clear()
        call.add_done_callback(self._leave)

    def stall(self, call: asyncio.Task[Any]) -> None:
        """Mark a call whose caller does not read its messages: a drain does not wait for this
        call."""
        if call in self._calls:
            self._stalled.add(call)
            self._look()

    def move(self, call: asyncio.Task[Any]) -> None:
        """Undo ``stall``: the caller reads again. Harmless for a call that never stalled."""
        if call in self._stalled:
            self._stalled.discard(call)
            self._idle.clear()

    def _leave(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        self._stalled.discard(call)
        self._look()

    def _look(self) -> None:
        if self._calls <= self._stalled:
            self._idle.set()

    def hurry(self) -> None:
        """End the grace period of the drain now."""
        self._hurry.set()

    async def drain(self, grace_s: float) -> int:
        """Refuse new calls and wait until those in flight have ended, at most ``grace_s`` seconds.

        The drain does not wait for calls whose callers do not read. Calls that are still in flight
        after the grace period are cancelled and answered with ENGINE_DRAINING. Returns their
        number.
        """
        self.phase = Phase.DRAINING
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._hurry)]
        try:
            await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._hurry.set()
        cut = list(self._calls)
        for call in cut:
            call.cancel()
        if cut:
            await asyncio.wait(cut, timeout=CUT_LIMIT_S)
        return len(cut)


CUT_LIMIT_S = 5.0
"""Maximum time, in seconds, that a drain waits for cancelled calls to clean up."""
