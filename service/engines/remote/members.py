"""One back end of a model, whatever its API: state, health and load."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from service.engines.remote.backend import BackEnd
from service.engines.remote.images import Outgoing
from service.errors import ServiceError
from service.types import Chunk, GenerateRequest, Grammar


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


class Member(Protocol):
    """A back end of one model.

    name: for logs and metrics. assumed: the server by its settings alone. description: what is
    known of it; None until it was reached.
    takes_tools: whether definitions of tools reach the model as they are meant.
    healthy: whether its last check or request reached it. in_flight: requests that it works on.
    """

    name: str
    takes_tools: bool
    assumed: BackEnd
    description: BackEnd | None
    healthy: bool
    in_flight: int

    async def check(self) -> None:
        """Look whether the server works and serves the model, and describe it where it was not
        reached before. Sets ``healthy``. Raises ``NotBegun``."""
        ...

    async def prepare(self, grammar: Grammar) -> None:
        """Raise ``GrammarError`` for a grammar that the server is known to refuse. A server that
        does not tell, or cannot tell now, refuses it when it gets the request."""
        ...

    def generate(self, request: GenerateRequest, images: Outgoing) -> AsyncGenerator[Chunk, None]:
        """See `service.engine.Engine.generate`. Raises ``NotBegun`` before the first chunk."""
        ...

    async def close(self) -> None:
        """Close its connections; requests in flight break."""
        ...
