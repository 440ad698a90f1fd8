"""A bound on the work of one validation: no schema and no answer can stall the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

DEFAULT_SECONDS = 2.0
DEFAULT_STEPS = 50_000_000
"""Steps of regular expressions: states of the pattern times characters of the text; about 20 ns
each at worst."""


class BudgetExceeded(Exception):
    """The work did not end within its bound."""


@dataclass(slots=True)
class Budget:
    """Seconds of processor time of the thread that makes the budget and works under it, and steps of
    regular expressions, which cannot be interrupted once begun.

    Time for which the thread waits does not count, so that a busy machine changes no result. The clock
    bounds calls from outside: the pool kills a process at its time limit.
    """

    seconds: float = DEFAULT_SECONDS
    steps: int = DEFAULT_STEPS
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.thread_time() + self.seconds

    def part(self, share: float) -> Budget:
        """A budget of a share of what is left."""
        seconds = max(self.deadline - time.thread_time(), 0.0)
        return Budget(seconds * share, int(max(self.steps, 0) * share))

    def check(self) -> None:
        """Raise ``BudgetExceeded`` when the time is over."""
        if time.thread_time() > self.deadline:
            raise BudgetExceeded

    def spend(self, steps: int) -> None:
        """Take steps before doing them."""
        self.steps -= steps
        if self.steps < 0:
            raise BudgetExceeded


# Validators are cached and shared between threads; the budget belongs to one call.
_current: ContextVar[Budget] = ContextVar("budget")


def current() -> Budget:
    """The budget of the call that is running."""
    return _current.get()


@contextmanager
def bounded(budget: Budget) -> Iterator[None]:
    """Run the body under a budget."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)
