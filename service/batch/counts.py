"""Counts rows while a run goes on: in each actor, in one place for all of them, and on the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

REPORT_S = 0.5
"""Time between two reports of an actor, in seconds."""
SHOW_S = 1.0
LINE_S = 10.0
"""Time between two lines where the progress is not shown on a terminal, in seconds."""
WINDOW_S = 60.0
"""Time over which the rate is measured, in seconds."""


@dataclass
class Counts:
    """Rows that were answered, and their tokens. errors: reason -> number of rows."""

    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def row(self, row: Mapping[str, Any]) -> None:
        """Count a row with the columns of an answer."""
        self.rows += 1
        self.prompt_tokens += row.get("prompt_tokens") or 0
        self.output_tokens += row.get("output_tokens") or 0
        if row.get("error_reason"):
            self.errors[row["error_reason"]] += 1

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.errors.update(other.errors)

    @property
    def failed(self) -> int:
        """Rows with an error."""
        return sum(self.errors.values())


@dataclass
class Snapshot:
    """The state of a run. note: the latest step of an engine that loads; failure: why the run ends."""

    counts: Counts
    shards: int
    note: str
    failure: str


class Board:
    """Where the actors of a run report. One Ray actor for the whole run.

    most_starts: how many engines may start without a shard being finished in between.
    """

    def __init__(self, most_starts: int) -> None:
        self._starts_left = self._most_starts = most_starts
        self._open: dict[int, Counts] = {}
        self._finished: set[int] = set()
        self._counts = Counts()
        self._note = self._failure = ""

    def start(self) -> bool:
        """An engine starts, for the first time or because its process has died. Returns False if
        that has happened too often; the run then ends."""
        self._starts_left -= 1
        if self._starts_left < 0:
            shards = ", ".join(map(str, sorted(self._open))) or "none"
            self.fail(
                f"engines were started more than {self._most_starts} times and no shard was "
                f"finished. Shards in work: {shards}. On a cluster, the logs of the processes are "
                "in /tmp/ray/session_latest/logs of their machine."
            )
        return self._starts_left >= 0

    def report(self, shard: int, counts: Counts) -> None:
        """The counts of a shard so far. A shard that is begun again replaces its counts."""
        if shard not in self._finished:
            self._open[shard] = counts

    def finish(self, shard: int, counts: Counts) -> None:
        """The shard is written."""
        self._open.pop(shard, None)
        if shard not in self._finished:
            self._finished.add(shard)
            self._counts.add(counts)
            self._starts_left = self._most_starts

    def tell(self, note: str) -> None:
        self._note = note

    def fail(self, failure: str) -> None:
        self._failure = self._failure or failure

    def snapshot(self) -> Snapshot:
        counts = Counts()
        for one in (self._counts, *self._open.values()):
            counts.add(one)
        return Snapshot(counts, len(self._finished), self._note, self._failure)


class ShardCounter:
    """Counts the rows of a shard, and reports them from time to time. Called from one thread.

    report: called with the counts.
    """

    def __init__(self, report: Callable[[Counts], None]) -> None:
        self.counts = Counts()
        self._report = report
        self._next = time.monotonic() + REPORT_S

    def row(self, row: Mapping[str, Any]) -> None:
        self.counts.row(row)
        if time.monotonic() >= self._next:
            self._report(self.counts)
            self._next = time.monotonic() + REPORT_S


class Display:
    """Shows the progress of a run: on a terminal one line that changes, elsewhere a line at times.

    total: rows of the whole input. before: rows that earlier runs have written. look: the state now;
    None where it cannot be had.
    """

    def __init__(
        self,
        total: int,
        before: int,
        look: Callable[[], Snapshot | None],
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._before, self._look = total, before, look
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._rate = Rate()
        self._note = ""

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _run(self) -> None:
        due = 0.0
        while not self._stop.wait(SHOW_S):
            state = self._look()
            if state is None:
                continue
            now = time.monotonic()
            self._rate.add(now, state.counts.rows)
            if state.note != self._note and not state.counts.rows:
                self._write(f"… {state.note}", last=True)
                self._note = state.note
            if state.counts.rows and (self._terminal or now >= due):
                self._write(self.line(state), last=not self._terminal)
                due = now + LINE_S

    def _write(self, text: str, last: bool) -> None:
        begin = "\r\x1b[K" if self._terminal else ""
        self._stream.write(f"{begin}{text}" + ("\n" if last else ""))
        self._stream.flush()

    def line(self, state: Snapshot) -> str:
        """The progress in one line."""
        counts, rate = state.counts, self._rate.per_s
        done = self._before + counts.rows
        parts = [f"{done:,} of {self._total:,} rows ({done / self._total:.1%})"]
        if rate:
            parts += [f"{rate:,.1f} rows/s", f"{spoken((self._total - done) / rate)} left"]
        parts.append(tokens(counts))
        if counts.errors:
            parts.append(f"{counts.failed:,} errors: {reasons(counts.errors)}")
        return " · ".join(parts)


class Rate:
    """Rows per second over the last minute."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, at_s: float, rows: int) -> None:
        """So many rows were done at this time of a clock."""
        if self._points and rows == 0:
            self._points.clear()  # the engine still loads
        self._points.append((at_s, rows))
        while self._points[-1][0] - self._points[0][0] > WINDOW_S:
            self._points.popleft()

    @property
    def per_s(self) -> float:
        """0 where it is not known yet."""
        if len(self._points) < 2:
            return 0.0
        (begin_s, first), (end_s, last) = self._points[0], self._points[-1]
        return max(0, last - first) / (end_s - begin_s)


def tokens(counts: Counts) -> str:
    return f"{counts.prompt_tokens:,} prompt and {counts.output_tokens:,} answer tokens"


def reasons(errors: Counter[str]) -> str:
    """``IMAGE_EMPTY 3, IMAGE_TRUNCATED 1``, the most frequent first."""
    return ", ".join(f"{reason} {number:,}" for reason, number in errors.most_common())


def spoken(seconds: float) -> str:
    """A time as text: 42 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
