"""A replica: another engine inside a process of Ray Serve."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from service.deadlines import Deadline
from service.engine import CollectsText, Engine
from service.engines.ray.collecting import Room, batches
from service.engines.ray.link import LinkAddress, Listener
from service.engines.ray.messages import Batch, as_value
from service.errors import ServiceError
from service.types import Capabilities, Grammar


class Replica:
    """Runs an engine. Ray Serve calls its methods.

    build: makes the engine. text_delay_s: maximum time for which chunks are collected. ongoing:
    maximum number of requests at the same time, however they come; further ones wait.
    on_failed_start: called with the reason when the engine does not start.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it
        self,
        build: Callable[[], Engine],
        text_delay_s: float,
        ongoing: int,
        on_failed_start: Callable[[str], None],
    ) -> None:
        self._text_delay_s = text_delay_s
        self._room = Room(ongoing)
        self._address: LinkAddress | None = None
        try:
            self._engine = build()
            if isinstance(self._engine, CollectsText):
                self._engine.collect_text(text_delay_s)
                self._text_delay_s = 0.0  # it has passed when the text comes
            self._listener = Listener(self._engine.generate, self._room, self._text_delay_s)
            await self._engine.start()
        except (ServiceError, ValueError) as error:
            on_failed_start(str(error))
            raise
        if os.environ.get("RAY_USE_TLS", "0") == "0":  # links are not encrypted
            self._address = await self._listener.start(_host())

    async def link(self) -> LinkAddress | None:
        """Where servers can have a link to this replica; None where they cannot."""
        return self._address

    async def describe(self) -> Capabilities:
        """What the engine can do."""
        return self._engine.capabilities

    async def active(self) -> int:
        """Number of requests that have begun and not ended."""
        return self._room.active

    async def process(self) -> int:
        """The id of the process on its machine."""
        return os.getpid()

    async def check_health(self) -> None:
        """Ray Serve calls it every few seconds, and replaces the replica when it raises."""
        await self._engine.check_health()

    async def prepare(self, grammar: Grammar) -> Exception | None:
        """Compile a grammar. Returns the error of the engine."""
        try:
            await self._engine.prepare(grammar)
        except Exception as error:
            return as_value(error)
        return None

    async def generate(self, packed: bytes, left_s: float | None) -> AsyncGenerator[Batch, None]:
        """Run one request, as the pickled `GenerateRequest`. left_s: seconds until nobody waits for
        the answer; None: no limit."""
        limit = None if left_s is None else Deadline(left_s)
        async with self._room:
            left_s = None if limit is None else limit.left_s
            found = batches(self._engine.generate, packed, left_s, self._text_delay_s)
            async with aclosing(found):
                async for batch in found:
                    yield batch

    async def __del__(self) -> None:
        """Ray Serve calls it when the replica ends in order and the requests that Ray Serve knows
        have ended. Ray Serve ends the process when this takes too long."""
        self._listener.leave()
        await self._room.empty()
        await self._engine.close()


def _host() -> str:
    """The address of this machine that other machines of the cluster use."""
    import ray.util

    return str(ray.util.get_node_ip_address())
