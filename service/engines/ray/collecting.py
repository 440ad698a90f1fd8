"""What the two ways into a replica share: the limit of its requests, and how it collects the chunks of
their answers before they cross."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

from service.deadlines import Deadline
from service.engines.ray.messages import Batch, as_value, late
from service.types import Chunk, GenerateRequest

MOST_CHUNKS = 4096
"""Maximum number of chunks in one message of Ray Serve, which has at most 4 MiB."""

Generate = Callable[[GenerateRequest], AsyncIterator[Chunk]]
"""Runs one request on the engine of a replica."""


class Room:
    """Places for requests on a replica, however they come. A request has one with ``async with``."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._active = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def active(self) -> int:
        """Number of requests that have a place."""
        return self._active

    @property
    def full(self) -> bool:
        """Whether a further request waits for a place."""
        return self._places.locked()

    async def empty(self) -> None:
        """Wait until no request has a place, nor waited for the last one."""
        while self._active:  # one that waits takes a place before this goes on
            await self._empty.wait()

    async def __aenter__(self) -> None:
        await self._places.acquire()
        self._active += 1
        self._empty.clear()

    async def __aexit__(self, *_: object) -> None:
        self._places.release()
        self._active -= 1
        if not self._active:
            self._empty.set()


class Outbox:
    """Batches of answers that go out together.

    delay_s: maximum time for which text is collected. send: gets numbers of requests, and a batch for
    each of them.
    """

    def __init__(self, delay_s: float, send: Callable[[list[tuple[int, Batch]]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._delay_s = delay_s
        self._send = send
        self._parts: dict[int, _Part] = {}
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None

    async def answer(
        self, number: int, generate: Generate, packed: bytes, left_s: float | None
    ) -> None:
        """Run one request, and send its answer. Its errors are sent behind its text, also that of a
        pickle that cannot be read. Nothing is sent after a cancellation.

        left_s: seconds until nobody waits for the answer; None: no limit.
        """
        part = _Part(self._loop.time())
        try:
            request: GenerateRequest = pickle.loads(packed)
            del packed
            if left_s is None:
                await self._collect(generate(request), number, part, request.piecewise)
            else:
                limit = Deadline(left_s)
                chunks = generate(replace(request, deadline=limit.at))
                await limit.wait(self._collect(chunks, number, part, request.piecewise), late)
        except asyncio.CancelledError:
            if _is_cancelled():
                self._parts.pop(number, None)
                raise
            part.error = as_value(RuntimeError("the engine cancelled an answer"))
        except Exception as error:
            part.error = as_value(error)
        if part.chunks or part.error is not None:
            self._put(number, part, at_once=True)

    async def _collect(
        self, chunks: AsyncIterator[Chunk], number: int, part: _Part, piecewise: bool
    ) -> None:
        """Put the first and the last chunk out at once, and others within the delay; nothing before
        the end where nobody reads piecewise."""
        first, last = True, False
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                part.chunks.append(chunk)
                last = chunk.finish_reason is not None
                if piecewise:
                    self._put(number, part, at_once=first or last)
                    first = False
        if not last:
            raise RuntimeError("the engine ended an answer without a reason")

    def _put(self, number: int, part: _Part, *, at_once: bool) -> None:
        """Send a part with the next message: in this turn of the event loop, or within the delay."""
        self._parts[number] = part
        if at_once:
            if self._soon is None:
                self._soon = self._loop.call_soon(self._flush)
        elif self._later is None:
            self._later = self._loop.call_later(self._delay_s, self._flush)

    def _flush(self) -> None:
        for waiting in (self._soon, self._later):
            if waiting is not None:
                waiting.cancel()
        self._soon = self._later = None
        parts, self._parts = self._parts, {}
        if parts:
            now = self._loop.time()
            self._send([(number, part.taken(now)) for number, part in parts.items()])


def _is_cancelled() -> bool:
    """Whether this task is cancelled, and not only what it waits for. Python 3.10 does not tell."""
    task = asyncio.current_task()
    if sys.version_info < (3, 11) or task is None:
        return True
    return task.cancelling() > 0


class _Part:
    """What of an answer is collected."""

    def __init__(self, begun: float) -> None:
        self._begun = begun
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None

    def taken(self, now: float) -> Batch:
        chunks, self.chunks = self.chunks, []
        return Batch(chunks, self.error, now - self._begun)


async def batches(
    generate: Generate, packed: bytes, left_s: float | None, delay_s: float
) -> AsyncGenerator[Batch, None]:
    """Run one request whose answer has a way of its own. Closing the iterator cancels it."""
    found: asyncio.Queue[Batch] = asyncio.Queue()
    outbox = Outbox(delay_s, lambda sent: found.put_nowait(sent[0][1]))
    task = asyncio.create_task(outbox.answer(0, generate, packed, left_s), name="answer")
    del packed
    ended = False
    try:
        while not ended:
            batch = await found.get()
            ended = batch.last
            chunks = batch.chunks
            while len(chunks) > MOST_CHUNKS:
                yield Batch(chunks[:MOST_CHUNKS], None, batch.age_s)
                chunks = chunks[MOST_CHUNKS:]
            yield Batch(chunks, batch.error, batch.age_s)
    finally:
        if not ended:
            task.cancel()
        await asyncio.wait([task])
