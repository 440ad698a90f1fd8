"""A replica: another engine inside a process of Ray Serve.

What a replica sends is values, errors included: Ray turns an exception that is raised here into one
of its own, which has lost its fields.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from service.engine import Engine
from service.errors import EngineUnavailable, InferenceTimeout, ServiceError, forget_frames
from service.types import (
    Capabilities,
    Chunk,
    FinishReason,
    GenerateRequest,
    Grammar,
    Timings,
    Usage,
)

MOST_CHUNKS = 4096
"""Maximum number of chunks that cross together: a message of Ray Serve has 4 MiB."""

log = logging.getLogger(__name__)


class ReplicaError(RuntimeError):
    """A defect in a replica: its traceback as text, for the log of the server."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that cross together.

    error: why there are no more. age_s: seconds since the replica received the request.
    """

    chunks: list[Chunk]
    error: Exception | None
    age_s: float

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        ended = bool(self.chunks) and self.chunks[-1].finish_reason is not None
        return ended or self.error is not None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle chunks as plain tuples: dataclasses take about thirty times as long."""
        return _restored, ([_plain(chunk) for chunk in self.chunks], self.error, self.age_s)


def _plain(chunk: Chunk) -> tuple[Any, ...]:
    usage, reason, end = chunk.usage, chunk.finish_reason, None
    if reason is not None:
        timings = chunk.timings
        end = (reason.value, timings.queue_s, timings.first_token_s, timings.total_s)
    return chunk.text, usage.prompt_tokens, usage.image_tokens, usage.output_tokens, end


def _restored(plain: list[tuple[Any, ...]], error: Exception | None, age_s: float) -> Batch:
    chunks = []
    for text, prompt, image, output, end in plain:
        usage = Usage(prompt, image, output)
        if end is None:
            chunks.append(Chunk(text, None, usage))
        else:
            chunks.append(Chunk(text, FinishReason(end[0]), usage, Timings(*end[1:])))
    return Batch(chunks, error, age_s)


class Replica:
    """Runs an engine. Ray Serve calls its methods.

    build: makes the engine. text_delay_s: maximum time for which chunks are collected.
    on_failed_start: called with the reason when the engine does not start.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it
        self,
        build: Callable[[], Engine],
        text_delay_s: float,
        on_failed_start: Callable[[str], None],
    ) -> None:
        self._text_delay_s = text_delay_s
        self._active = 0
        try:
            self._engine = build()
            await self._engine.start()
        except (ServiceError, ValueError) as error:
            on_failed_start(str(error))
            raise

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
        begun = now()
        deadline = None if left_s is None else begun + left_s
        request: GenerateRequest = replace(pickle.loads(packed), deadline=deadline)
        delay_s = self._text_delay_s if request.piecewise else None
        self._active += 1
        try:
            collected = batches(self._engine.generate(request), delay_s, deadline)
            async with aclosing(collected) as found:
                async for chunks, error in found:
                    yield Batch(chunks, error, now() - begun)
        finally:
            self._active -= 1

    async def __del__(self) -> None:
        """Ray Serve calls it when the replica ends in order."""
        await self._engine.close()


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
                yield collector.take(), InferenceTimeout("Inference took longer than the deadline.")
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


def as_value(error: Exception) -> Exception:
    """An error that survives the way to the server: a ``ServiceError`` as it is, any other one as
    text."""
    if isinstance(error, ServiceError):
        forget_frames(error)
        error.__cause__ = error.__context__ = None
        return error
    log.exception("the engine of a replica failed", exc_info=error)
    return ReplicaError("".join(traceback.format_exception(error)))


def lost(error: Exception) -> bool:
    """Whether a request may be run again on another replica: the engine of this one has ended or
    makes no progress."""
    return isinstance(error, EngineUnavailable)
