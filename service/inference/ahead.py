"""Reading a text ahead of a slow reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_CHARACTERS = 1 << 20
"""Characters of text that are kept for a reader; more than the context of a model holds."""
WHOLE = 64
"""Pieces that are kept as they came; later ones are put together, which takes less memory."""
PIECE_CHARACTERS = 4096
"""Length up to which pieces are put together."""


async def ahead(
    source: AsyncGenerator[str | T, None], max_characters: int = MAX_CHARACTERS
) -> AsyncGenerator[str | T, None]:
    """Pieces of text and other items of ``source``, which is read as fast as it goes.

    So what the source holds, such as a slot, is free when the source is done, not when a slow
    reader is. The source waits for the reader only while ``max_characters`` of text are kept. A
    reader who is behind gets longer pieces. Raises what the source raised, behind its last item.
    Closing this closes the source.
    """
    backlog: _Backlog[T] = _Backlog(max_characters)

    async def read() -> None:
        error: Exception | None = None
        try:
            async with aclosing(source) as opened:
                async for item in opened:
                    await backlog.put(item)
        except Exception as raised:  # handed to the reader
            error = raised
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
    """Items that a reader has not taken yet."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._items: deque[str | T] = deque()
        self._characters = 0
        self._changed = asyncio.Event()
        self._ended = False
        self.error: Exception | None = None

    async def put(self, item: str | T) -> None:
        """Append an item, and wait while too much text is kept."""
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
        await asyncio.sleep(0)  # a source that never waits lets the reader have its turn
        while self._characters > self._max_characters:
            await self._changed.wait()

    def end(self, error: Exception | None) -> None:
        """No more items come."""
        self._ended, self.error = True, error
        self._wake()

    async def filled(self) -> bool:
        """Wait for an item; False when all have been taken and no more come."""
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
