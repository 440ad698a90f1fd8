"""Results that are kept by their key, within a bound of how much text they were made from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Kept(Generic[V]):
    """The results used last. Threads may share it; two may make the same result at the same time.

    max_entries: of results. max_characters: of the texts that they were made from, all together; the
    last one is kept whatever its length.
    """

    def __init__(self, max_entries: int, max_characters: int) -> None:
        self._max_entries = max_entries
        self._max_characters = max_characters
        self._characters = 0
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, characters: int, make: Callable[[], V]) -> V:
        """The result for a key, made where it is not kept. characters: of its text."""
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
                return known[0]
        made = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made, characters
                self._characters += characters
            while len(self._entries) > 1 and (
                self._characters > self._max_characters or len(self._entries) > self._max_entries
            ):
                self._characters -= self._entries.popitem(last=False)[1][1]
        return made
