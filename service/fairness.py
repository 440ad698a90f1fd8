"""A queue that is fair between callers."""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of callers that wait for their turn, and how many turns each caller holds.

    The next turn goes to the waiting caller that holds the fewest; among equals, to the caller whose
    last turn is the longest ago. Items of one caller are served first come, first served, so the
    items of one caller alone are, too. Callers are known by their names.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        """In the order in which callers take turns; no queue is empty."""
        self._held: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._size

    def waiting(self, caller: str) -> int:
        """Items of a caller that wait."""
        return len(self._waiting.get(caller, ()))

    def held(self, caller: str) -> int:
        """Turns that a caller holds."""
        return self._held[caller]

    def put(self, caller: str, item: T) -> None:
        """Let an item wait."""
        self._waiting.setdefault(caller, deque()).append(item)
        self._size += 1

    def hold(self, caller: str) -> None:
        """Count a turn that nobody had to wait for."""
        self._held[caller] += 1

    def give_back(self, caller: str) -> None:
        """End a turn of a caller."""
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]

    def peek(self) -> T:
        """The item whose turn it is, which goes on waiting. Raises ``IndexError`` when nothing waits."""
        return self._waiting[self._next()][0]

    def take(self) -> tuple[str, T]:
        """The caller and the item whose turn it is; the turn is held from now on.

        Raises ``IndexError`` when nothing waits.
        """
        caller = self._next()
        queue = self._waiting.pop(caller)
        item = queue.popleft()
        if queue:
            self._waiting[caller] = queue  # behind all others
        self._size -= 1
        self.hold(caller)
        return caller, item

    def discard(self, caller: str, item: T) -> bool:
        """Take an item out of the queue. Returns whether it was there."""
        queue = self._waiting.get(caller)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        self._shrunk(caller, queue)
        return True

    def make_room(self, caller: str) -> T | None:
        """Take the newest item of the caller with the most waiting items out of a full queue.

        None where ``caller`` would then have as many waiting items as that one, or more: then it is
        this caller who has to come again.
        """
        if not self._waiting:
            return None
        longest = max(self._waiting, key=self.waiting)
        queue = self._waiting[longest]
        if len(queue) <= self.waiting(caller) + 1:
            return None
        item = queue.pop()
        self._shrunk(longest, queue)
        return item

    def _next(self) -> str:
        if not self._waiting:
            raise IndexError("nothing waits")
        return min(self._waiting, key=self._held.__getitem__)  # the first of equals

    def _shrunk(self, caller: str, queue: deque[T]) -> None:
        self._size -= 1
        if not queue:
            del self._waiting[caller]
