"""A queue that is fair between callers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Line(Generic[T]):
    """One caller. held: turns that it holds; last: number of its last turn."""

    items: deque[T] = field(default_factory=deque)
    held: int = 0
    last: int = 0


class FairQueue(Generic[T]):
    """Items of callers that wait for their turn, and how many turns each caller holds.

    The next turn goes to the waiting caller that holds the fewest; among equals, to the caller whose
    last turn is the longest ago. Items of one caller are served first come, first served, so the
    items of one caller alone are, too. Callers are known by their names, and forgotten when they
    neither wait nor hold a turn.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._waiting: dict[str, _Line[T]] = {}
        """Those of the lines that have items."""
        self._size = 0
        self._turns = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._size

    def waiting(self, caller: str) -> int:
        """Items of a caller that wait."""
        line = self._lines.get(caller)
        return len(line.items) if line else 0

    def held(self, caller: str) -> int:
        """Turns that a caller holds."""
        line = self._lines.get(caller)
        return line.held if line else 0

    def put(self, caller: str, item: T) -> None:
        """Let an item wait."""
        line = self._line(caller)
        line.items.append(item)
        self._waiting[caller] = line
        self._size += 1

    def hold(self, caller: str) -> None:
        """Count a turn that nobody had to wait for."""
        self._turns += 1
        line = self._line(caller)
        line.held += 1
        line.last = self._turns

    def give_back(self, caller: str) -> None:
        """End a turn of a caller."""
        line = self._lines[caller]
        line.held -= 1
        if not (line.held or line.items):
            del self._lines[caller]

    def peek(self) -> T:
        """The item whose turn it is, which goes on waiting. Raises ``IndexError`` when nothing waits."""
        return self._next()[1].items[0]

    def take(self) -> tuple[str, T]:
        """The caller and the item whose turn it is; the turn is held from now on.

        Raises ``IndexError`` when nothing waits.
        """
        caller, line = self._next()
        item = line.items.popleft()
        self.hold(caller)
        self._shrunk(caller, line)
        return caller, item

    def discard(self, caller: str, item: T) -> bool:
        """Take an item out of the queue. Returns whether it was there."""
        line = self._waiting.get(caller)
        if line is None or item not in line.items:
            return False
        line.items.remove(item)
        self._shrunk(caller, line)
        return True

    def make_room(self, caller: str) -> T | None:
        """Take the newest item of the caller with the most waiting items out of a full queue.

        None where ``caller`` would then have as many waiting items as that one, or more: then it is
        this caller who has to come again.
        """
        if not self._waiting:
            return None
        longest = max(self._waiting, key=self.waiting)
        line = self._waiting[longest]
        if len(line.items) <= self.waiting(caller) + 1:
            return None
        item = line.items.pop()
        self._shrunk(longest, line)
        return item

    def _next(self) -> tuple[str, _Line[T]]:
        if not self._waiting:
            raise IndexError("nothing waits")
        return min(self._waiting.items(), key=_order)

    def _line(self, caller: str) -> _Line[T]:
        line = self._lines.get(caller)
        if line is None:
            line = self._lines[caller] = _Line()
        return line

    def _shrunk(self, caller: str, line: _Line[T]) -> None:
        """An item has left a line."""
        self._size -= 1
        if not line.items:
            del self._waiting[caller]
            if not line.held:
                del self._lines[caller]


def _order(entry: tuple[str, _Line[T]]) -> tuple[int, int]:
    _, line = entry
    return line.held, line.last
