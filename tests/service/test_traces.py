"""Traces: what they show, whose spans they follow, and that a collector gets them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings, SettingsError
from service.tasks.registry import load_registry
from service.traces import Traces
from tests.service.harness import (
    ROOT,
    Running,
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    until,
)
from tests.service.http_api.harness import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CALLER = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)


@asynccontextmanager
async def traced(
    engine: FakeEngine | None = None, sampler: Any = None, **settings: Any
) -> AsyncIterator[tuple[Running, InMemorySpanExporter]]:
    """A server, and the spans of calls that have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with running(engine, **settings) as started:
        started.server.runtime.observation.tracing = Traces(provider)
        yield started, exporter


async def tree(exporter: InMemorySpanExporter) -> tuple[Any, dict[str, Any]]:
    """The span of the one call that there was, and those below it by their names. Every span but
    that of the call is below another one and within its time."""
    await until(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
    spans = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    [root] = [span for span in spans if span.kind is SpanKind.SERVER]
    for span in spans:
        if span is not root:
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
            assert span.context.trace_id == root.context.trace_id
    return root, {span.name: span for span in spans if span is not root}


def parent_of(span: Any, found: dict[str, Any], root: Any) -> str:
    ids = {one.context.span_id: one.name for one in (*found.values(), root)}
    return str(ids[span.parent.span_id])


class Decoding(FakeEngine):
    """Decodes its images, as real engines do."""

    async def generate(self, request: Any) -> Any:
        for image in request.images:
            await image.reduced(lambda rows: None)
        async for chunk in super().generate(request):
            yield chunk


async def test_a_call_shows_its_parts_below_the_span_of_its_caller() -> None:
    schema = '{"type": "array", "items": {"enum": ["one"]}}'
    engine = Decoding('["one"]', token_delay_s=0.001)
    async with traced(engine) as (started, exporter):
        call = started.stub.RunTask(
            run_request(inline(json_schema=schema), [image_bytes()]),
            metadata=(*FROM_CALLER, ("x-request-id", "order-66")),
            timeout=60,
        )
        answer = await call
        root, found = await tree(exporter)
        trailers = dict(await call.trailing_metadata())
    assert root.name == "qwen3vl.v1.VisionService/RunTask"
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert trailers["traceresponse"][:-2] == f"00-{TRACE}-{root.context.span_id:016x}-"
    assert trailers["x-request-id"] == root.attributes["qwen3vl.request_id"] == "order-66"
    assert {name: parent_of(span, found, root) for name, span in found.items()} == {
        **dict.fromkeys(("analyse grammar", "read image headers", "queue"), root.name),
        **dict.fromkeys(("compile grammar", "decode image", "attempt"), root.name),
        **dict.fromkeys(("prefill", "generate", "validate"), "attempt"),
    }
    assert found["read image headers"].attributes["qwen3vl.images"] == 1
    assert root.attributes["qwen3vl.code"] == "OK"
    assert root.attributes["gen_ai.request.model"] == "fake"
    assert root.attributes["gen_ai.usage.output_tokens"] == answer.result.usage.output_tokens
    assert root.status.status_code is StatusCode.UNSET


async def test_a_stream_has_the_same_parts() -> None:
    async with traced() as (started, exporter):
        stream = pb.StreamTaskRequest(task=inline())
        call = started.stub.StreamTask(stream, timeout=60, metadata=FROM_CALLER)
        _ = [event async for event in call]
        root, found = await tree(exporter)
        assert dict(await call.trailing_metadata())["traceresponse"].split("-")[1] == TRACE
    assert root.name.endswith("/StreamTask")
    assert found.keys() == {"queue", "attempt", "prefill", "generate", "validate"}


async def test_a_call_over_http_is_traced_as_well() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with serving() as served:
        served.runtime.observation.tracing = Traces(provider)
        reply = await served.chat(dict(FROM_CALLER))
        root, found = await tree(exporter)
    assert reply.headers["traceresponse"].split("-")[1] == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["qwen3vl.transport"] == "http"
    assert found.keys() == {"queue", "attempt", "prefill", "generate", "validate"}


async def test_every_attempt_has_a_span_and_a_failure_its_reason() -> None:
    # A violation that is known at the end of an answer alone: others end it before its validation.
    schema = '{"type": "array", "contains": {"const": 5}, "uniqueItems": true, "maxItems": 4}'
    async with traced(FakeEngine("[1, 2]"), output_retries=2) as (started, exporter):
        request = run_request(inline(json_schema=schema), temperature=1.0)
        await failure(started.stub.RunTask(request, timeout=60))
        root, _ = await tree(exporter)
        spans = exporter.get_finished_spans()
    attempts = [span for span in spans if span.name == "attempt"]
    assert [span.attributes["qwen3vl.attempt"] for span in attempts] == [1, 2, 3]
    checks = [span for span in spans if span.name == "validate"]
    assert [span.parent.span_id for span in checks] == [one.context.span_id for one in attempts]
    assert {span.status.description for span in checks} == {"OUTPUT_INVALID"}
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "OUTPUT_INVALID"


async def test_an_engine_that_fails_before_the_first_token() -> None:
    engine = FakeEngine()
    async with traced(engine) as (started, exporter):
        engine.crash_after = 0
        await failure(started.stub.RunTask(run_request(), timeout=60))
        root, found = await tree(exporter)
    assert found.keys() == {"queue", "attempt", "prefill"}
    assert found["prefill"].status.status_code is StatusCode.ERROR
    assert root.attributes["qwen3vl.reason"] == "INTERNAL"


async def test_a_mistake_of_the_caller_is_no_failure_of_the_server() -> None:
    async with traced() as (started, exporter):
        call = started.stub.RunTask(run_request(pb.Task(name="none")), timeout=60)
        await failure(call)
        root, found = await tree(exporter)
        trailers = dict(await call.trailing_metadata())
    assert trailers["traceresponse"].split("-")[2] == f"{root.context.span_id:016x}"
    assert (root.status.status_code, found) == (StatusCode.UNSET, {})
    assert root.attributes["qwen3vl.reason"] == "UNKNOWN_TASK"


async def test_texts_of_callers_stay_out_of_traces() -> None:
    secret = "Xyzzy"
    schema = f'{{"properties": {{"{secret}": {{"type": "integer"}}}}, "required": ["{secret}"]}}'
    async with traced(FakeEngine(f'{{"{secret}": "x"}}')) as (started, exporter):
        await failure(
            started.stub.RunTask(run_request(inline(secret, json_schema=schema)), timeout=60)
        )
        bad = inline(secret, json_schema="{" + secret)
        await failure(started.stub.RunTask(run_request(bad), timeout=60))
        await until(lambda: len(exporter.get_finished_spans()) > 2)
        assert secret not in "".join(one.to_json() for one in exporter.get_finished_spans())


async def test_the_access_log_names_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    async with traced() as (started, exporter):
        await started.stub.RunTask(run_request(), timeout=60, metadata=FROM_CALLER)
        await tree(exporter)
    assert f" trace_id={TRACE} " in caplog.messages[-1]


@pytest.mark.parametrize("parent", ["", "x", f"00-{'0' * 32}-{PARENT}-01"])
async def test_a_traceparent_that_is_none_begins_a_trace(parent: str) -> None:
    async with traced() as (started, _):
        metadata = (("traceparent", parent),)
        call = started.stub.RunTask(run_request(), timeout=60, metadata=metadata)
        await call
        version, trace, _, flags = dict(await call.trailing_metadata())["traceresponse"].split("-")
    assert (version, int(flags, 16) & 1) == ("00", 1)
    assert trace != "0" * 32


async def test_a_trace_that_is_not_sampled_costs_no_spans() -> None:
    async with traced(sampler=ALWAYS_OFF) as (started, exporter):
        call = started.stub.RunTask(run_request(), timeout=60, metadata=FROM_CALLER)
        await call
        response = dict(await call.trailing_metadata())["traceresponse"]
        assert not exporter.get_finished_spans()
    assert response.startswith(f"00-{TRACE}-")
    assert int(response.rpartition("-")[2], 16) & 1 == 0


async def test_health_checks_are_not_traced() -> None:
    async with traced() as (started, exporter):
        health = health_pb2_grpc.HealthStub(started.channel)
        await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
        await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        root, _ = await tree(exporter)
    assert root.name.endswith("/GetModel")


async def test_without_traces_a_call_says_nothing_of_them() -> None:
    async with running() as started:
        call = started.stub.RunTask(run_request(), timeout=60, metadata=FROM_CALLER)
        await call
        assert "traceresponse" not in dict(await call.trailing_metadata())


# From the variables of the environment to a collector


class Collector:
    """Takes traces over OTLP."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def resources(self) -> dict[str, str]:
        attributes = self.received[0].resource_spans[0].resource.attributes
        return {one.key: one.value.string_value for one in attributes}

    @property
    def names(self) -> set[str]:
        return {
            span.name
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@contextmanager
def over_grpc(collector: Collector) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def over_http(collector: Collector) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            data = self.rfile.read(int(self.headers["content-length"]))
            collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(data), None)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_gets_the_traces(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    receiver = over_grpc if protocol == "grpc" else over_http
    with receiver(collector) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "vision-a")
        async with running(traces=True) as started:
            await started.stub.RunTask(run_request(), timeout=60)
        # The end of the server has sent what it had.
        assert collector.names >= {"qwen3vl.v1.VisionService/RunTask", "queue", "prefill"}
        assert collector.resources["service.name"] == "vision-a"
        assert collector.resources["service.version"]


async def test_a_collector_that_is_away_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.traces.CLOSE_LIMIT_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    async with running(traces=True) as started:
        for _ in range(5):
            await started.stub.RunTask(run_request(), timeout=60)


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        (
            "OTEL_TRACES_EXPORTER",
            "zipkin",
            "traces: OTEL_TRACES_EXPORTER is 'zipkin'; allowed: otlp",
        ),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "traces: OTEL_EXPORTER_OTLP_PROTOCOL is"),
    ],
)
async def test_a_wrong_variable_ends_the_start(
    variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    server = VisionServer(Settings(port=0, traces=True), FakeEngine(), load_registry(None))
    with pytest.raises(SettingsError, match=problem):
        await server.start()
    await server.stop(0)


async def test_off_by_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with running(traces=True) as started:
        call = started.stub.RunTask(run_request(), timeout=60)
        await call
        assert "traceresponse" not in dict(await call.trailing_metadata())


WITHOUT = """
import asyncio, sys
sys.modules["opentelemetry"] = None
from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.settings import Settings
from service.tasks.registry import load_registry

async def main(traces):
    server = VisionServer(Settings(port=0, traces=traces), FakeEngine(), load_registry(None))
    try:
        await server.start()
        await server.load()
        print("serves")
    except Exception as error:
        print(error)
    await server.stop(0)

asyncio.run(main(False))
asyncio.run(main(True))
"""


@pytest.mark.slow  # imports in a process of its own
def test_without_the_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "serves",
        "traces: the extra otel is not installed: pip install 'qwen3vl-grpc[otel]'",
    ], done.stderr
    assert "asyncio" not in done.stderr
