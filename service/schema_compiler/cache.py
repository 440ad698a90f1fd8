"""A cache of results, bounded by the size of the texts that they were made from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class SingleFlightCache(Generic[V]):
    """Keeps the most recently used results. Threads may share it: when several ask for the same result,
    one makes it and the others wait.

    max_entries: number of results. max_characters: total length of the texts that the results were made
    from; the last result is kept whatever its length. Errors are not kept.
    """

    def __init__(self, max_entries: int, max_characters: int) -> None:
        self._max_entries = max_entries
        self._max_characters = max_characters
        self._characters = 0
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._in_flight: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, characters: int, make: Callable[[], V]) -> V:
        """The result for a key; made if it is not kept. characters: length of its text. Raises the
        errors of ``make``."""
        while True:
            with self._lock:
                known = self._entries.get(key)
                if known is not None:
                    self._entries.move_to_end(key)
                    return known[0]
                made_elsewhere = self._in_flight.get(key)
                if made_elsewhere is None:
                    done = self._in_flight[key] = threading.Event()
                    break
            made_elsewhere.wait()
        try:
            made = make()
            self._keep(key, made, characters)
            return made
        finally:
            with self._lock:
                del self._in_flight[key]
            done.set()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._entries

    def clear(self) -> None:
        """Forget all results."""
        with self._lock:
            self._entries.clear()
            self._characters = 0

    def _keep(self, key: Hashable, made: V, characters: int) -> None:
        with self._lock:
            self._entries[key] = made, characters
            self._characters += characters
            while len(self._entries) > 1 and (
                self._characters > self._max_characters or len(self._entries) > self._max_entries
            ):
                self._characters -= self._entries.popitem(last=False)[1][1]
