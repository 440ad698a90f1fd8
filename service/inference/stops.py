"""Stop texts: an answer ends before the first stop text.

One filter serves every engine. Engines stop at tokens, and a token may contain a stop text and more
characters; this filter cuts the text at the exact character.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from service.errors import InvalidRequest
from service.types import Chunk, FinishReason, Timings

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


def check_stops(stops: Sequence[str]) -> None:
    """Raise ``InvalidRequest`` for too many stop texts, or for one that is empty or too long."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"has {len(stops)} texts, at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(stops):
        if not stop or len(stop) > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop[{index}]" if len(stops) > 1 else "stop",
                f"has {len(stop)} characters; 1 to {MAX_STOP_CHARACTERS} are allowed",
            )


class StopFilter:
    """Passes a text on up to the first stop text, independent of how the text is split into chunks.

    The first stop text is the one that is complete first, so the cut does not depend on the chunks.
    Characters that may begin a stop text are held back until the next characters decide.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Add a chunk; returns the text that is certainly outside any stop text. ``found`` tells
        whether a stop text is complete."""
        text = self._held + piece
        ends = [
            (begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """The characters that were still held back when the text ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


async def until_stop(
    chunks: AsyncIterator[Chunk], stops: Sequence[str]
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an engine up to the first stop text; the last chunk then has STOP_TEXT.

    The engine's iterator is closed at the stop text, which frees the request's memory.
    """
    begun = time.monotonic()
    first_s = 0.0
    kept = StopFilter(stops)
    source: Any = chunks  # a generator: it can be closed
    async with aclosing(source) as opened:
        async for chunk in opened:
            text = kept.feed(chunk.text)
            first_s = first_s or time.monotonic() - begun
            if kept.found:
                timings = Timings(0.0, first_s, time.monotonic() - begun)
                ended = chunk.timings if chunk.finish_reason else timings
                yield Chunk(text, FinishReason.STOP_TEXT, chunk.usage, ended)
                return
            if chunk.finish_reason is not None:
                yield replace(chunk, text=text + kept.end())
                return
            yield replace(chunk, text=text)
