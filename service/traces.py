"""OpenTelemetry traces of calls, made of their records. Needs the extra ``otel``.

A call has one span of its own, which follows the ``traceparent`` of the caller. Its parts are noted
in the record while the call runs, and become spans when it ends. opentelemetry-instrumentation-grpc
would make the first span, and was not taken: it sees the status and not the reason, it knows one of
our front ends, and it would trace every health check.

Variables ``OTEL_…`` decide where traces go and how many: the SDK reads them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service import __version__
from service.observation import CallRecord, Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

CLOSE_LIMIT_S = 5.0
"""How long the end of the server waits for a collector that does not take the last spans."""
SERVER_FAULTS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
"""Codes that make the span of a server failed, by the semantic conventions for RPC."""
EXPORTERS = ("otlp", "console", "none")
PROTOCOLS = ("http/protobuf", "grpc")


class Traces:
    """Makes spans of records. provider: where spans go."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import propagate, trace

        self._provider = provider
        self._tracer = provider.get_tracer("qwen3vl", __version__)
        self._propagate, self._trace = propagate, trace

    def begin(self, record: CallRecord, metadata: Mapping[str, Any]) -> None:
        """Begin the span of a call, below the span of its caller where ``metadata`` names one."""
        carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
        span = self._tracer.start_span(
            record.path.removeprefix("/") or record.method,
            context=self._propagate.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
        )
        found = span.get_span_context()
        if not found.is_valid:  # OTEL_SDK_DISABLED
            return
        record.traceparent = (
            f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
        )
        if span.is_recording():
            record.spans = []
            record.open_span = span

    def end(self, record: CallRecord) -> None:
        """Give the span of a call its parts, and end it."""
        span, record.open_span = record.open_span, None
        if span is None:
            return
        span.set_attributes(_attributes(record))
        if record.code in SERVER_FAULTS:
            span.set_status(self._trace.StatusCode.ERROR, record.reason)
        whole = self._trace.set_span_in_context(span)
        parents = {0: whole}
        for attempt, (begun, ended) in sorted(_attempts(record).items()):
            one = self._tracer.start_span("attempt", whole, start_time=begun)
            one.set_attribute("qwen3vl.attempt", attempt)
            parents[attempt] = self._trace.set_span_in_context(one)
            one.end(ended)
        for part in record.spans or ():
            one = self._tracer.start_span(
                part.name, parents[part.attempt], start_time=part.begun_ns
            )
            one.set_attributes({f"qwen3vl.{key}": value for key, value in part.attributes.items()})
            if part.error:
                one.set_status(self._trace.StatusCode.ERROR, part.error)
            one.end(part.ended_ns)
        span.end()

    def close(self) -> None:
        """Send what is left, within a limit: a collector that is away must not keep the process."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(CLOSE_LIMIT_S)


def _attempts(record: CallRecord) -> dict[int, tuple[int, int]]:
    """Begin and end of every attempt."""
    found: dict[int, list[Span]] = {}
    for part in record.spans or ():
        if part.attempt:
            found.setdefault(part.attempt, []).append(part)
    return {
        number: (min(one.begun_ns for one in parts), max(one.ended_ns for one in parts))
        for number, parts in found.items()
    }


def _attributes(record: CallRecord) -> dict[str, Any]:
    found: dict[str, Any] = {
        "qwen3vl.transport": record.transport,
        "qwen3vl.method": record.method,
        "qwen3vl.request_id": record.request_id,
        "qwen3vl.code": record.code,
        "qwen3vl.reason": record.reason,
        "qwen3vl.caller": record.caller,
        "qwen3vl.images": record.images,
        "qwen3vl.pixels": record.pixels,
        "qwen3vl.queued_s": record.queued_s,
        "qwen3vl.attempts": record.attempts,
    }
    if record.transport == "grpc":
        found["rpc.system"] = "grpc"
    if record.model:
        found |= {"gen_ai.request.model": record.model, "qwen3vl.task": record.task}
    if record.attempts:
        found |= {
            "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": record.usage.output_tokens,
            "qwen3vl.image_tokens": record.usage.image_tokens,
            "gen_ai.response.finish_reasons": [record.finish_reason],
        }
    return found


def from_environment() -> Traces:
    """Traces that go where the variables ``OTEL_…`` say; by default with OTLP to this machine.

    Raises ``ImportError`` without the extra, ``ValueError`` for a variable that is wrong.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": "qwen3vl", "service.version": __version__})
    resource = ours.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = _exporter()
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider)


def _exporter() -> SpanExporter | None:
    kind = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind not in EXPORTERS:
        raise ValueError(f"OTEL_TRACES_EXPORTER is {kind!r}; allowed: {', '.join(EXPORTERS)}")
    if kind == "none":
        return None
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    variable = next((name for name in names if os.environ.get(name)), None)
    protocol = os.environ[variable] if variable else PROTOCOLS[0]
    if protocol not in PROTOCOLS:
        raise ValueError(f"{variable} is {protocol!r}; allowed: {', '.join(PROTOCOLS)}")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http()
