"""Reads an answer from the engine faster than its caller reads it, up to a limit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_CHARACTERS = 1 << 20
"""Maximum number of characters that are buffered for a reader; more than the context of a model
holds."""
WHOLE = 64
"""Number of chunks that are buffered unchanged; later chunks are joined, which saves memory."""
PIECE_CHARACTERS = 4096
"""Maximum length, in characters, of joined chunks."""


async def ahead(
    source: AsyncGenerator[str | T, None], max_characters: int = MAX_CHARACTERS
) -> AsyncGenerator[str | T, None]:
    """Yield the items of ``source``, which is read as fast as it produces them.

    A resource that the source holds, such as a slot, is thus released when the source ends, not
    when a slow reader ends. The source waits for the reader only while ``max_characters`` of text
    are buffered. A slow reader gets longer chunks. An error of the source is raised after its last
    item. Closing this generator closes the source.
    """
    backlog: _Backlog[T] = _Backlog(max_characters)

    async def read() -> None:
        error: BaseException | None = None
        try:
            async with aclosing(source) as opened:
                async for item in opened:
                    await backlog.put(item)
        except Exception as raised:  # handed to the reader
            error = raised
        except BaseException:  # the source was cancelled, or this task with its reader
            error = asyncio.CancelledError()  # the traceback of the first one would keep images
            raise
        finally:
            backlog.end(error)

    reading = asyncio.create_task(read(), name="ahead")
    try:
        while await backlog.filled():
            yield backlog.take()
        if backlog.error is not None:
            raise backlog.error
    finally:
        reading.cancel()
        await asyncio.wait([reading])


class _Backlog(Generic[T]):
    """Buffered items that the reader has not taken yet."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._items: deque[str | T] = deque()
        self._characters = 0
        self._changed = asyncio.Event()
        self._ended = False
        self.error: BaseException | None = None

    async def put(self, item: str | T) -> None:
        """Append an item, and wait while too much text is buffered."""
        last = self._items[-1] if len(self._items) > WHOLE else None
        if isinstance(item, str):
            self._characters += len(item)
            if isinstance(last, str) and len(last) < PIECE_CHARACTERS:
                self._items[-1] = last + item
            else:
                self._items.append(item)
        else:
            self._items.append(item)
        self._wake()
        await asyncio.sleep(0)  # a source that never awaits would otherwise starve the reader
        while self._characters > self._max_characters:
            await self._changed.wait()

    def end(self, error: BaseException | None) -> None:
        """Mark the end: no more items follow."""
        self._ended, self.error = True, error
        self._wake()

    async def filled(self) -> bool:
        """Wait for an item; False when all items have been taken and no more follow."""
        while not self._items and not self._ended:
            await self._changed.wait()
        return bool(self._items)

    def take(self) -> str | T:
        """The oldest item."""
        item = self._items.popleft()
        if isinstance(item, str):
            self._characters -= len(item)
            self._wake()
        return item

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
