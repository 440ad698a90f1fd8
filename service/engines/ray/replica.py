"""A replica: another engine inside a process of Ray Serve."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

from service.engine import CollectsText, Engine
from service.engines.ray.link import LinkAddress, Listener
from service.engines.ray.messages import Batch, as_value, late
from service.errors import ServiceError
from service.types import Capabilities, Chunk, GenerateRequest, Grammar

MOST_CHUNKS = 4096
"""Maximum number of chunks that cross together: a message of Ray Serve has 4 MiB."""


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
        self._room = asyncio.Semaphore(ongoing)
        self._active = 0
        self._none_active = asyncio.Event()
        self._none_active.set()
        self._address: LinkAddress | None = None
        try:
            self._engine = build()
            if isinstance(self._engine, CollectsText):
                self._engine.collect_text(text_delay_s)
                self._text_delay_s = 0.0  # it has passed when the text comes
            self._listener = Listener(self._run, self._room, self._text_delay_s)
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
        return self._active

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
        now = asyncio.get_running_loop().time
        deadline = None if left_s is None else now() + left_s
        request: GenerateRequest = replace(pickle.loads(packed), deadline=deadline)
        delay_s = self._text_delay_s if request.piecewise else None
        async with self._room:
            begun = now()
            async with aclosing(batches(self._run(request), delay_s, deadline)) as found:
                async for chunks, error in found:
                    yield Batch(chunks, error, now() - begun)

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Run one request on the engine."""
        self._active += 1
        self._none_active.clear()
        try:
            async with aclosing(self._engine.generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self._active -= 1
            if not self._active:
                self._none_active.set()

    async def __del__(self) -> None:
        """Ray Serve calls it when the replica ends in order and the requests that Ray Serve knows
        have ended. Ray Serve ends the process when this takes too long."""
        self._listener.leave()
        await self._none_active.wait()
        await self._engine.close()


def _host() -> str:
    """The address of this machine that other machines of the cluster use."""
    import ray.util

    return str(ray.util.get_node_ip_address())


async def batches(
    chunks: AsyncIterator[Chunk], delay_s: float | None, deadline: float | None = None
) -> AsyncGenerator[tuple[list[Chunk], Exception | None], None]:
    """Collect chunks: the first ones at once, then every ``delay_s`` seconds, and the rest with the
    error, if there is one, as soon as the chunks end. Without ``delay_s``, all of them at the end.

    deadline: time of the event loop's clock after which there is only an ``InferenceTimeout``.
    Closing the iterator closes that of the chunks.
    """
    now = asyncio.get_running_loop().time
    collector = _Collector(chunks)
    task = asyncio.create_task(collector.run(), name="collect-chunks")
    try:
        pause_s = 0.0
        while not collector.ended.is_set():
            left_s = None if deadline is None else deadline - now()
            awaited = collector.ended if delay_s is None else collector.some
            if not await _set_within(awaited, left_s):
                yield collector.take(), late()
                return
            if pause_s:
                await _set_within(collector.ended, pause_s)
            if collector.ended.is_set():
                break
            yield collector.take(), None
            pause_s = delay_s or 0.0
        while collector.count > MOST_CHUNKS:
            yield collector.take(), None
        yield collector.take(), collector.error
    finally:
        task.cancel()
        await asyncio.wait([task])


class _Collector:
    """Takes chunks as they come."""

    def __init__(self, chunks: AsyncIterator[Chunk]) -> None:
        self._chunks = chunks
        self._found: list[Chunk] = []
        self.error: Exception | None = None
        self.some = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def count(self) -> int:
        """Number of chunks since the last time."""
        return len(self._found)

    async def run(self) -> None:
        try:
            async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self._found.append(chunk)
                    self.some.set()
        except Exception as error:
            self.error = as_value(error)
        finally:
            self.some.set()
            self.ended.set()

    def take(self) -> list[Chunk]:
        """The first of the chunks since the last time, at most ``MOST_CHUNKS``."""
        found, self._found = self._found[:MOST_CHUNKS], self._found[MOST_CHUNKS:]
        if not self._found and not self.ended.is_set():
            self.some.clear()
        return found


async def _set_within(event: asyncio.Event, limit_s: float | None) -> bool:
    """Wait for an event. Returns whether it came in time."""
    if event.is_set():
        return True
    waiting = asyncio.ensure_future(event.wait())
    try:
        done, _ = await asyncio.wait([waiting], timeout=limit_s)
    finally:
        waiting.cancel()
    return bool(done)
