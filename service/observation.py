"""What is known of one call, whichever front end it came through: for metrics, logs and traces.

A front end begins the record of a call and ends it. Inference finds it in a context variable and
writes down what only inference knows. When the call has ended, everybody who listens reads the record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from service.error_table import row_of
from service.errors import InternalError, ServiceError
from service.types import Chunk, Usage

OK, CANCELLED = "OK", "CANCELLED"
NO_TOKENS = Usage()


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call. Times are in seconds; ``None`` and 0 stand for what did not happen.

    transport: "grpc", "http", ... method: a name of the front end's own, never text of a caller.
    code: name of the gRPC status, of every front end. reason: one of the error table; "-" without
    one. task: name of a registered task; "inline" for one that came with the call. images, pixels,
    image_bytes: of the examples of the task as well. queued_s: waits for memory, for a slot and in the
    engine's queue. first_token_s: from the beginning of the call. usage: of all attempts together.
    token_s: mean time of the tokens behind the first one.
    """

    transport: str
    method: str
    request_id: str = "-"
    caller: str = "-"
    model: str = ""
    task: str = ""
    images: int = 0
    pixels: int = 0
    image_bytes: int = 0
    queued_s: float = 0.0
    admitted: bool = False
    first_token_s: float | None = None
    usage: Usage = NO_TOKENS
    attempts: int = 0
    finish_reason: str = ""
    code: str = ""
    reason: str = "-"
    seconds: float = 0.0
    _begun: float = field(default_factory=time.perf_counter)
    _decode_s: float = 0.0
    _decoded: int = 0

    @property
    def token_s(self) -> float | None:
        return self._decode_s / self._decoded if self._decoded else None

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """The body is a wait for memory and a slot, in vain where it raises."""
        begun = time.perf_counter()
        try:
            yield
            self.admitted = True
        finally:
            self.queued_s += time.perf_counter() - begun

    def generated(self, chunk: Chunk) -> None:
        """The engine gave a chunk."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self._begun
        if chunk.finish_reason is None:
            return
        usage, timings = chunk.usage, chunk.timings
        self.attempts += 1
        self.finish_reason = chunk.finish_reason.value
        self.queued_s += timings.queue_s
        self.usage = Usage(
            self.usage.prompt_tokens + usage.prompt_tokens,
            self.usage.image_tokens + usage.image_tokens,
            self.usage.output_tokens + usage.output_tokens,
        )
        if usage.output_tokens > 1:
            self._decode_s += timings.total_s - timings.first_token_s
            self._decoded += usage.output_tokens - 1


_current: ContextVar[CallRecord | None] = ContextVar("call_record", default=None)


def current() -> CallRecord:
    """The record of the call that this task works for; outside of a call, one that nobody reads."""
    return _current.get() or CallRecord("-", "-")


Listener = Callable[[CallRecord], None]
"""Told of every call that has ended. Must be quick and must not raise."""


class Observation:
    """Begins and ends the records of calls. Front ends find it in ``Runtime.observation``."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def begin(self, transport: str, method: str, request_id: str = "-") -> CallRecord:
        """A new record, which is the current one of this task and of the tasks that it starts."""
        record = CallRecord(transport, method, request_id)
        _current.set(record)
        return record

    def end(self, record: CallRecord, code: str, reason: str = "-") -> None:
        """The call has ended; of several ends the first one counts."""
        if record.code:
            return
        record.code, record.reason = code, reason
        record.seconds = time.perf_counter() - record._begun
        for listener in self.listeners:
            listener(record)

    @contextmanager
    def call(self, transport: str, method: str, request_id: str = "-") -> Iterator[CallRecord]:
        """``begin``, and ``end`` by the way in which the body ends; its error goes on."""
        record = self.begin(transport, method, request_id)
        try:
            yield record
        except asyncio.CancelledError:
            self.end(record, CANCELLED)
            raise
        except Exception as error:
            refused = error if isinstance(error, ServiceError) else InternalError("")
            row = row_of(refused)
            self.end(record, row.grpc, row.name)
            raise
        self.end(record, OK)
