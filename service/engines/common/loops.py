"""Stops answers that repeat themselves without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """Ends an answer with FinishReason.LOOP when its last tokens only repeat.

    The guard trips when the last ``window`` tokens have a period of at most ``longest`` tokens.
    Valid answers repeat less: 256 tokens are about 60 equal ``[0, 0]`` pairs. The guard checks
    every ``interval`` tokens, so that its cost is negligible. A ``window`` of 0 turns it off.
    """

    window: int = 256
    longest: int = 32
    interval: int = 32

    def trips(self, tokens: Sequence[int]) -> bool:
        """Whether the answer so far is in a loop; true at most every ``interval`` tokens."""
        if not self.window or len(tokens) < self.window or len(tokens) % self.interval:
            return False
        tail = list(tokens[-self.window :])
        return any(tail[period:] == tail[:-period] for period in range(1, self.longest + 1))
