"""One back end of a model, whatever its API: state, health and load."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Generic, TypeVar

from service import metrics
from service.engines.remote.backend import BackEnd
from service.engines.remote.images import Outgoing
from service.errors import EngineUnavailable, ServiceError
from service.types import Chunk, GenerateRequest, Grammar, Timings

CHECK_LIMIT_S = 5.0
"""Time limit of a health check and of a description, in seconds."""
MAX_REMEMBERED = 1024
"""Grammars of which a member remembers how the server takes them."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class NotBegun(Exception):
    """A back end generated nothing for a request, so that the request may be tried again.

    error: for the caller, if there is no further attempt. after_s: when the back end wants to be
    asked again; None where it does not say. permanent: another attempt would fail the same way.
    """

    def __init__(
        self, error: ServiceError, *, after_s: float | None = None, permanent: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.after_s = after_s
        self.permanent = permanent

    @classmethod
    def unreached(cls, *, permanent: bool = False) -> NotBegun:
        """No connection could be made."""
        error = unavailable("The model server cannot be reached.")
        return cls(error, permanent=permanent)

    @classmethod
    def not_now(cls, after_s: float | None = None) -> NotBegun:
        """The server loads, or stops."""
        error = unavailable("The model server cannot take requests now; try again later.")
        return cls(error, after_s=after_s)


class Remembered(Generic[T]):
    """What a member knows of the grammars that were used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[Grammar, T] = OrderedDict()

    def get(self, grammar: Grammar) -> T | None:
        """None where the grammar is not known."""
        if grammar not in self._known:
            return None
        self._known.move_to_end(grammar)
        return self._known[grammar]

    def keep(self, grammar: Grammar, known: T) -> None:
        self._known[grammar] = known
        self._known.move_to_end(grammar)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def forget(self) -> None:
        self._known.clear()


class Member(ABC):
    """A back end of one model.

    name: for logs and metrics. assumed: the server by its settings alone. silence_s: maximum time
    without a message. limit: maximum number of requests at a time.
    description: what is known of the server; None until it was reached.
    takes_tools: whether definitions of tools reach the model as they are meant.
    prepares: whether ``prepare`` asks the server.
    healthy: whether its last check or request reached it. in_flight: requests that it works on.
    """

    takes_tools = False
    prepares = False

    def __init__(self, name: str, assumed: BackEnd, *, silence_s: float, limit: int) -> None:
        self.name = name
        self.assumed = assumed
        self.description: BackEnd | None = None
        self.healthy = False
        self.in_flight = 0
        self._silence_s = silence_s
        self._places = asyncio.Semaphore(limit)
        self._stale = True
        """Whether the server has to be described before it gets a request."""

    async def check(self) -> None:
        """Look whether the server works and serves the model, and describe it where it was not
        reached before. Sets ``healthy``. Raises ``NotBegun``."""
        try:
            await self._look()
        except NotBegun as failed:
            self._lost(failed)
            raise
        if not self.healthy:
            log.info("back end %s works", self.name)
        self.healthy = True

    @abstractmethod
    async def prepare(self, grammar: Grammar) -> None:
        """Raise ``GrammarError`` for a grammar that the server is known to refuse. A server that
        does not tell, or cannot tell now, refuses it when it gets the request."""

    async def generate(
        self, request: GenerateRequest, images: Outgoing
    ) -> AsyncGenerator[Chunk, None]:
        """See `service.engine.Engine.generate`. Counted in the metrics by its outcome. Raises
        ``NotBegun`` before the first chunk."""
        begun = time.monotonic()
        outcome = "cancelled"
        running = metrics.backend_in_flight.labels(self.name)
        running.inc()
        self.in_flight += 1
        try:
            async with self._places:
                if self._unknown():
                    await self.check()
                assert self.description is not None
                answer = await self._begin(request, images, self.description)
                waited_s = time.monotonic() - begun
                first_s = 0.0
                async with aclosing(answer) as chunks:
                    async for chunk in chunks:
                        now_s = time.monotonic() - begun
                        first_s = first_s or now_s
                        if chunk.finish_reason is not None:
                            queue_s = min(waited_s + chunk.timings.queue_s, first_s)
                            chunk = replace(chunk, timings=Timings(queue_s, first_s, now_s))
                        yield chunk
            outcome = "ok"
        except NotBegun as failed:
            outcome = failed.error.reason
            raise
        except ServiceError as error:
            outcome = error.reason
            raise
        finally:
            self.in_flight -= 1
            running.dec()
            # Once this task waits: an answer that is complete goes out first.
            loop = asyncio.get_running_loop()
            loop.call_soon(self._count, outcome, time.monotonic() - begun)

    def _count(self, outcome: str, seconds: float) -> None:
        metrics.backend_up.labels(self.name).set(self.healthy)
        metrics.count_backend_request(self.name, outcome, seconds)

    @abstractmethod
    async def close(self) -> None:
        """Close its connections; requests in flight break."""

    @abstractmethod
    async def _look(self) -> None:
        """Ask the server whether it works, and describe it where ``_undescribed``. Raises
        ``NotBegun``."""

    @abstractmethod
    async def _begin(
        self, request: GenerateRequest, images: Outgoing, back_end: BackEnd
    ) -> AsyncGenerator[Chunk, None]:
        """Encode a request, and return the answer to it. Nothing is sent before its first chunk is
        asked for. The timings of the last chunk are those that the server tells."""

    def _undescribed(self) -> bool:
        return self.description is None or self._stale or not self.healthy

    def _unknown(self) -> bool:
        """Whether the server has to be checked before it gets a request."""
        return self.description is None or self._stale

    def _lost(self, why: Exception) -> None:
        if self.healthy:
            log.warning("back end %s does not work: %s", self.name, why)
        self.healthy = False

    def _stalled(self) -> EngineUnavailable:
        return EngineUnavailable(
            f"The model server sent nothing for {self._silence_s:g} s.", reason="ENGINE_STALLED"
        )

    @staticmethod
    def _broken_off() -> EngineUnavailable:
        return unavailable("The connection to the model server broke within an answer.")


def unavailable(text: str) -> EngineUnavailable:
    return EngineUnavailable(text, reason="BACKEND_UNREACHABLE")
