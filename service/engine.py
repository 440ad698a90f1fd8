"""The engine protocol: the interface between the service and the code that computes tokens.

An engine is chosen once, at start-up. The rest of the service uses only this protocol.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from service.types import Capabilities, Chunk, EngineLoad, GenerateRequest, Grammar

LOAD_LIMIT_S = 1.0

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Generates text for a prompt with images, under a grammar.

    Every method may be called concurrently from one event loop and must not block it.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do. Valid once ``start`` has returned."""
        ...

    async def start(self) -> None:
        """Load the model. Raises ``EngineUnavailable``, whose message says what is wrong and how to
        fix it."""
        ...

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar outside the event loop, or find it in the cache.

        Raises ``GrammarError`` when the grammar cannot be compiled.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Run one request and yield its chunks. Only the last chunk carries the finish reason and
        timings.

        Every chunk carries the usage so far, because a caller may stop after any chunk.

        Closing the iterator (``aclose``) cancels the request within one decode step and frees memory.
        Raises ``ContextTooLong``, ``GrammarError``, ``VisionDisabled``, ``Overloaded`` or ``EngineUnavailable``.
        """
        ...

    async def check_health(self) -> None:
        """Return if the engine makes progress; raise ``EngineUnavailable`` if it does not.

        Called every few seconds, also while requests run, and must not wait behind them. After a
        failure an engine may stay unhealthy until it has generated a token: the server then
        generates one token on the idle engine and calls this method again.
        """
        ...

    async def close(self) -> None:
        """Stop the engine and free its memory. Requests in flight end with
        ``EngineUnavailable``."""
        ...


@runtime_checkable
class TellsLoad(Protocol):
    """An engine that can say how busy it is, for metrics and load balancers. Optional."""

    async def load(self) -> EngineLoad | None:
        """The load at this moment; None where that cannot be told soon, as before the start."""
        ...


@runtime_checkable
class CollectsText(Protocol):
    """An engine that can keep text back, so that what comes within a short time costs less processor
    time. Optional."""

    def collect_text(self, delay_s: float) -> None:
        """Keep text back for up to ``delay_s`` seconds from now on, but not the first one of an answer,
        its end and its error; where nobody reads piecewise, up to the end. Text that was kept back
        comes as one chunk where the request is joinable. Called before the start."""
        ...


async def load_of(engine: Engine) -> EngineLoad | None:
    """The load of an engine; None where the engine does not tell, or not soon.

    Metrics are read most when an engine fails: an error of its own is logged, never raised.
    """
    if not isinstance(engine, TellsLoad):
        return None
    try:
        return await asyncio.wait_for(engine.load(), LOAD_LIMIT_S)
    except Exception as error:
        log.warning("the engine does not tell its load: %s", type(error).__name__)
        return None
