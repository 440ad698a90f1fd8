"""What is known of one call, whichever front end it came through: for metrics, logs and traces.

A front end begins the record of a call and ends it. Inference finds it in a context variable and
writes down what only inference knows. When the call has ended, everybody who listens reads the record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from service.error_table import row_of
from service.errors import InternalError, ServiceError
from service.types import Chunk, Usage

OK, CANCELLED = "OK", "CANCELLED"
NO_TOKENS = Usage()
NO_METADATA: Mapping[str, Any] = MappingProxyType({})


_NO_SPAN: AbstractContextManager[None] = nullcontext()


@dataclass(slots=True, eq=False)
class Span:
    """A part of a call, for its trace. Times are in nanoseconds since 1970.

    Attributes:
        attempt: number of the attempt that the part belongs to, from 1; 0 for parts of the whole
            call.
        error: name of the error with which the part failed; empty if it did not fail.
    """

    name: str
    begun_ns: int
    ended_ns: int = 0
    attempt: int = 0
    error: str = ""
    attributes: dict[str, int | str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call. Times are in seconds. ``None``, 0 or an empty text: it did not happen, or is not known.

    Attributes:
        transport: "grpc", "http" or "connect".
        method: name of the method; never text that the caller chose.
        task: name of a registered task; "inline" for a task that came with the call.
        images, pixels, image_bytes: of the images of the call and of the examples of its task.
        queued_s: waits for memory, for a slot and in the engine's queue.
        admitted: whether the call got a slot.
        first_token_s: time from the beginning of the call to its first token.
        usage: tokens of all attempts together.
        code: name of the gRPC status, for every transport.
        reason: reason of the error, see ``service.error_table``; "-" without an error.
        path: full name of the method, if it is longer than ``method``.
        peer: address of the caller.
        probe: whether the call is a health check, which is counted, but neither logged nor traced.
        traceparent: W3C traceparent of the call's own span; empty without traces.
        spans: parts of the call; None if no trace of the call is recorded.
        open_span: span of the tracer, for the tracer only.
        log_output: whether the raw answer is written to the log.
        generations: number of attempts that the engine began; ``attempts`` counts those that ended.
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
    path: str = ""
    peer: str = "-"
    probe: bool = False
    traceparent: str = ""
    spans: list[Span] | None = None
    open_span: Any = None
    log_output: bool = False
    generations: int = 0
    _first_chunk_ns: int = 0
    _unfinished: Usage = NO_TOKENS
    _begun: float = field(default_factory=time.perf_counter)
    _decode_s: float = 0.0
    _decoded: int = 0

    @property
    def token_s(self) -> float | None:
        return self._decode_s / self._decoded if self._decoded else None

    def tokens(self) -> int:
        """Tokens of prompts and answers so far, those of an attempt that has not ended included."""
        both = (self.usage, self._unfinished)
        return sum(usage.prompt_tokens + usage.output_tokens for usage in both)

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """The body is a wait for memory and a slot, in vain where it raises."""
        begun = time.perf_counter()
        try:
            with self.span("queue"):
                yield
            self.admitted = True
        finally:
            self.queued_s += time.perf_counter() - begun

    def span(self, name: str, **attributes: int | str) -> AbstractContextManager[None]:
        """The body is a part of the call that its trace shows."""
        return _NO_SPAN if self.spans is None else self._span(name, attributes)

    @contextmanager
    def _span(
        self, name: str, attributes: dict[str, int | str], attempt: int = 0
    ) -> Iterator[None]:
        assert self.spans is not None
        span = Span(name, time.time_ns(), attempt=attempt, attributes=attributes)
        try:
            yield
        except BaseException as error:
            span.error = _name_of(error)
            raise
        finally:
            span.ended_ns = time.time_ns()
            self.spans.append(span)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The body is an attempt: the engine generates an answer."""
        self.generations += 1
        if self.spans is None:
            yield
            return
        number, self._first_chunk_ns = self.generations, 0
        prefill = Span("prefill", time.time_ns(), attempt=number)
        generation = Span("generate", 0, attempt=number)
        try:
            yield
        except BaseException as error:
            generation.error = prefill.error = _name_of(error)
            raise
        finally:
            ended = time.time_ns()
            prefill.ended_ns = self._first_chunk_ns or ended
            self.spans.append(prefill)
            if self._first_chunk_ns:
                prefill.error = ""
                generation.begun_ns, generation.ended_ns = self._first_chunk_ns, ended
                self.spans.append(generation)

    def validating(self) -> AbstractContextManager[None]:
        """The body checks the answer of the latest attempt."""
        if self.spans is None:
            return _NO_SPAN
        return self._span("validate", {}, self.generations)

    def generated(self, chunk: Chunk) -> None:
        """The engine gave a chunk."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self._begun
        if self.spans is not None and not self._first_chunk_ns:
            self._first_chunk_ns = time.time_ns()
        if chunk.finish_reason is None:
            self._unfinished = chunk.usage
            return
        usage, timings = chunk.usage, chunk.timings
        self._ended(usage, chunk.finish_reason.value)
        self.queued_s += timings.queue_s
        if usage.output_tokens > 1:
            self._decode_s += timings.total_s - timings.first_token_s
            self._decoded += usage.output_tokens - 1

    def ended_early(self, chunk: Chunk) -> None:
        """The service ended an attempt after this chunk, because its answer was invalid already. The
        engine has told no times of it."""
        self._ended(chunk.usage, "invalid")

    def _ended(self, usage: Usage, finish_reason: str) -> None:
        self._unfinished = NO_TOKENS
        self.attempts += 1
        self.finish_reason = finish_reason
        self.usage = Usage(
            self.usage.prompt_tokens + usage.prompt_tokens,
            self.usage.image_tokens + usage.image_tokens,
            self.usage.output_tokens + usage.output_tokens,
        )


_current: ContextVar[CallRecord | None] = ContextVar("call_record", default=None)


def current() -> CallRecord:
    """The record of the call that this task works for; outside of a call, one that nobody reads."""
    return _current.get() or CallRecord("-", "-")


Listener = Callable[[CallRecord], None]
"""Told of every call that has ended. Must be quick and must not raise."""


class Tracing(Protocol):
    """Makes traces of records, see ``service.traces``."""

    def begin(self, record: CallRecord, metadata: Mapping[str, Any]) -> None:
        """A call has begun: set ``traceparent`` and, where the trace is recorded, ``spans``."""
        ...

    def end(self, record: CallRecord) -> None:
        """The call has ended."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


LOG_OUTPUT_KEY = "x-log-output"
"""Metadata with which a caller asks for the raw answer in the log; the value is 1."""


class Observation:
    """Begins and ends the records of calls. Front ends find it in ``Runtime.observation``.

    log_output: whether callers may have their raw answers written to the log.
    """

    def __init__(self, *listeners: Listener, log_output: bool = False) -> None:
        self.listeners = list(listeners)
        self.tracing: Tracing | None = None
        self._log_output = log_output

    def begin(
        self,
        transport: str,
        method: str,
        request_id: str = "-",
        *,
        path: str = "",
        peer: str = "-",
        probe: bool = False,
        metadata: Mapping[str, Any] = NO_METADATA,
    ) -> CallRecord:
        """A new record, which is the current one of this task and of the tasks that it starts.

        metadata: of the caller, keys in lower case; headers in HTTP. For the rest see ``CallRecord``.
        """
        record = CallRecord(transport, method, request_id, path=path, peer=peer, probe=probe)
        if self._log_output and metadata.get(LOG_OUTPUT_KEY) == "1":
            record.log_output = True
        if self.tracing is not None and not probe:
            self.tracing.begin(record, metadata)
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
        if self.tracing is not None and record.traceparent:
            self.tracing.end(record)

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


def _name_of(error: BaseException) -> str:
    """The reason of an error, or its class where it has none: its text may repeat what callers sent."""
    return error.reason if isinstance(error, ServiceError) else type(error).__name__
