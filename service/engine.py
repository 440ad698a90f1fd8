"""The seam between the service and whatever computes tokens.

An engine is chosen once, at start-up, and everything above it sees only this protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from service.types import Capabilities, Chunk, GenerateRequest, Grammar


class Engine(Protocol):
    """Generates text for a prompt with images, under a grammar.

    Every method may be called concurrently from one event loop and must not block it.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do. Valid once ``start`` has returned."""
        ...

    async def start(self) -> None:
        """Load the model. Raises ``EngineUnavailable`` with what is wrong and how to fix it."""
        ...

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar, or find it in the cache, off the event loop.

        Raises ``GrammarError`` when it cannot be compiled.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Run one request; the last chunk, and only it, carries the finish reason and timings.

        Every chunk carries the usage so far: a caller may end the request at any chunk.

        Closing the iterator (``aclose``) cancels the work within one decode step and frees what it held.
        Raises ``ContextTooLong``, ``GrammarError``, ``VisionDisabled``, ``Overloaded`` or ``EngineUnavailable``.
        """
        ...

    async def check_health(self) -> None:
        """Return when the engine makes progress; raise ``EngineUnavailable`` when it does not.

        Called every few seconds, also while requests run: it must not wait behind them. After
        failures it may ask for a success: the server then generates one token on the idle engine
        and asks again.
        """
        ...

    async def close(self) -> None:
        """Stop and free everything. Requests in flight end with ``EngineUnavailable``."""
        ...
