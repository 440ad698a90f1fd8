"""How a run can end before its time."""

from __future__ import annotations


class BatchError(Exception):
    """The run cannot start or go on. The message says what is wrong and what to do; it is for the
    operator and may name files."""


class Stopped(Exception):
    """The run was interrupted. shards: number of shards that are complete, and of all."""

    def __init__(self, complete: int, count: int) -> None:
        super().__init__(complete, count)
        self.complete, self.count = complete, count
