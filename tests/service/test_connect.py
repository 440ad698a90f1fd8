"""The gRPC API as JSON over HTTP: the Connect protocol and gRPC-Web, with raw HTTP and real clients."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.sdk.trace import TracerProvider

from service.client import CallError, read_error
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.traces import Traces
from tests.service.harness import ROOT, SERVICE, image_bytes, of_a_closed_loop, until
from tests.service.http_api.harness import LONG, Reply, Serving, serving, small_buffers

pytestmark = pytest.mark.slow

connect = pytest.importorskip(
    "service.grpc_api.connect", reason="connectrpc needs Python 3.11 or newer"
)
from service.grpc_api import strict_json  # noqa: E402

BUF = Path(sys.executable).with_name("buf")
STREAMED = {"content-type": "application/connect+json"}
KEY = "a-long-random-key"


async def call(server: Serving, method: str, document: Any = None, **headers: str) -> Reply:
    """One unary call with JSON."""
    body = document if isinstance(document, bytes) else json.dumps(document or {}).encode()
    return await server.request("POST", f"{SERVICE}/{method}", body, headers)


def reason(reply: Reply) -> str:
    """The reason in the details of an error, which the header repeats."""
    (info,) = (one for one in reply.json["details"] if one["type"] == "google.rpc.ErrorInfo")
    found = error_details_pb2.ErrorInfo.FromString(base64.b64decode(info["value"] + "=="))
    assert reply.headers["x-error-reason"] == found.reason
    assert reply.headers["x-request-id"] == found.metadata["request_id"]
    return found.reason


def run(user: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"task": {"inline": {"user": user, **more}}}


def framed(document: Any) -> bytes:
    body = json.dumps(document).encode()
    return struct.pack(">BI", 0, len(body)) + body


def frames(body: bytes) -> Iterator[tuple[int, Any]]:
    """Flag and JSON of every message of a stream."""
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        yield flag, json.loads(body[5 : 5 + size])
        body = body[5 + size :]


# Answers


async def test_the_answers_are_those_of_grpc() -> None:
    image = {"data": base64.b64encode(image_bytes(40, 30)).decode()}
    requests: list[tuple[str, type[Any], dict[str, Any]]] = [
        ("AnalyzeImage", pb.AnalyzeImageRequest, {"images": [image]}),
        ("RunTask", pb.RunTaskRequest, run(grammar={"jsonSchema": '{"type": "object"}'})),
        ("ValidateSchema", pb.ValidateSchemaRequest, {"grammar": {"regex": "a+"}}),
        ("ListTasks", pb.ListTasksRequest, {}),
        ("GetTask", pb.GetTaskRequest, {"name": "image-analysis"}),
        ("GetModel", pb.GetModelRequest, {}),
    ]
    async with (
        serving() as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel,
    ):
        for method, kind, document in requests:
            stub = getattr(VisionServiceStub(channel), method)
            expected = untimed(await stub(json_format.ParseDict(document, kind())))
            reply = await call(server, method, document)
            assert reply.status == 200
            assert reply.headers["content-type"] == "application/json"
            given = json_format.Parse(reply.body, type(expected)())
            assert untimed(given) == expected, method


def untimed(message: Any) -> Any:
    """The message without the fields that differ from call to call."""
    for name in ("timings", "analysis_seconds", "compile_seconds"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    if isinstance(message, pb.RunTaskResponse):
        message.result.ClearField("timings")
    return message


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_an_error_over_grpc_web_has_its_details(method: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    message = pb.RunTaskRequest().SerializeToString()
    body = struct.pack(">BI", 0, len(message)) + message
    headers = {"content-type": "application/grpc-web+proto"}
    async with serving(api_keys_file=keys) as server:
        path = f"{SERVICE}/{method}"
        without = await server.request("POST", path, body, headers)
        wrong = await server.request("POST", path, body, {**headers, "x-api-key": KEY})
    found = []
    for reply in (without, wrong):
        flag, size = struct.unpack(">BI", reply.body[:5])
        assert (reply.status, flag, size) == (200, 0x80, len(reply.body) - 5)
        lines = (line.partition(": ") for line in reply.body[5:].decode().splitlines())
        trailers = {name: value for name, _, value in lines}
        packed = base64.b64decode(trailers["grpc-status-details-bin"] + "==")
        info = error_details_pb2.ErrorInfo()
        assert any(one.Unpack(info) for one in status_pb2.Status.FromString(packed).details)
        found.append((trailers["grpc-status"], info.reason))
    assert found == [("16", "API_KEY_MISSING"), ("3", "INVALID_FIELD")]


async def test_a_stream_has_the_pieces_and_the_result() -> None:
    async with serving(FakeEngine("one two three")) as server:
        reply = await server.request("POST", f"{SERVICE}/StreamTask", framed(run()), STREAMED)
    *events, (flag, end) = frames(reply.body)
    assert (reply.status, flag, end) == (200, 2, {})
    deltas = [event["delta"] for _, event in events if "delta" in event]
    assert "".join(deltas) == "one two three"
    assert len(deltas) > 1
    assert events[-1][1]["result"]["text"] == "one two three"


@pytest.mark.parametrize("protocol", ["connect", "grpcweb"])
async def test_buf_curl(protocol: str) -> None:
    async with serving(FakeEngine("one two")) as server:
        outputs = []
        for method in ("RunTask", "StreamTask"):
            process = await asyncio.create_subprocess_exec(
                BUF, "curl", "--protocol", protocol, "--schema", ROOT / "protos",
                "--data", json.dumps(run()), f"{server.http.place}{SERVICE}/{method}",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            output, problem = await process.communicate()
            assert process.returncode == 0, problem.decode()
            outputs.append(output.decode())
    assert json.loads(outputs[0])["result"]["text"] == "one two"
    decoder, text, found = json.JSONDecoder(), outputs[1].strip(), []
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].strip()
    assert "".join(one.get("delta", "") for one in found) == "one two"
    assert found[-1]["result"]["finishReason"] == "FINISH_REASON_STOP"


# Errors


REFUSED: list[tuple[str, dict[str, Any], type[Any]]] = [
    ("RunTask", {"task": {"name": "nothing"}}, pb.RunTaskRequest),
    ("RunTask", run(""), pb.RunTaskRequest),
    ("RunTask", {**run(), "sampling": {"temperature": 9}}, pb.RunTaskRequest),
    ("RunTask", {**run(), "images": [{"data": "AAAA"}]}, pb.RunTaskRequest),
    ("RunTask", run(grammar={"jsonSchema": "{"}), pb.RunTaskRequest),
    ("RunTask", {**run(), "sampling": {"maxTokens": 1}}, pb.RunTaskRequest),
    ("AnalyzeImage", {}, pb.AnalyzeImageRequest),
    ("GetTask", {"name": "nothing"}, pb.GetTaskRequest),
    ("ValidateSchema", {}, pb.ValidateSchemaRequest),
]


@pytest.mark.parametrize(("method", "document", "kind"), REFUSED)
async def test_the_errors_are_those_of_grpc(
    method: str, document: dict[str, Any], kind: type[Any]
) -> None:
    async with (
        serving() as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel,
    ):
        with pytest.raises(grpc.RpcError) as failed:
            await getattr(VisionServiceStub(channel), method)(
                json_format.ParseDict(document, kind())
            )
        expected: CallError = read_error(failed.value)
        reply = await call(server, method, document)
    assert reason(reply) == expected.reason
    assert reply.json["message"] == failed.value.details()
    assert reply.json["code"].upper() == failed.value.code().name


async def test_the_error_of_a_stream_comes_in_its_last_message() -> None:
    engine = FakeEngine("one two three")
    async with serving(engine, inference_timeout_s=2) as server:
        engine.hang_after = 2
        reply = await server.request("POST", f"{SERVICE}/StreamTask", framed(run()), STREAMED)
    *events, (flag, end) = frames(reply.body)
    assert "".join(event["delta"] for _, event in events) == "one two"
    assert (flag, end["error"]["code"]) == (2, "deadline_exceeded")
    assert any(one["type"] == "google.rpc.ErrorInfo" for one in end["error"]["details"])


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "empty"),
        (b"{", "JSON"),
        (b"[]", "JSON"),
        (b"\xff", "not a message"),
        (b'{"grammar": {"regex": "a"}, "grammar": {}}', "duplicate key"),
        (
            b'{"grammar": {"jsonSchema": {}}}',
            "grammar.json_schema must be text, with the JSON inside",
        ),
        (b'{"grammar": {"regex": 5}}', "grammar.regex must be text"),
        (b'{"grammar": {"choice": {"options": ["a", 5]}}}', "options[1] must be text"),
        (b'{"grammar": {"closeObjects": "yes"}}', "grammar.close_objects must be true or false"),
        (b'{"grammar": {"closeObjects": 1}}', "grammar.close_objects must be true or false"),
        (
            b'{"grammar": {"propertyOrder": "any"}}',
            "grammar.property_order must be one of: PROPERTY_",
        ),
    ],
)
async def test_a_body_that_is_no_request(body: bytes, part: str) -> None:
    async with serving() as server:
        reply = await call(server, "ValidateSchema", body)
    assert (reply.status, reason(reply)) == (400, "MALFORMED_REQUEST")
    assert part in reply.json["message"]
    assert "qwen3vl.v1" not in reply.json["message"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"grammr": {}}', 'the body has no field named "grammr"'),
        (
            b'{"grammar": {"jsonShema": "{}"}}',
            'grammar has no field named "jsonShema"; it takes: jsonSchema',
        ),
        (b'{"grammar": ' * 70 + b"1" + b"}" * 70, 'grammar has no field named "grammar"'),
    ],
)
async def test_a_field_that_the_server_does_not_know(body: bytes, part: str) -> None:
    async with serving() as server:
        reply = await call(server, "ValidateSchema", body)
    assert (reply.status, reason(reply)) == (400, "UNKNOWN_FIELD")
    assert part in reply.json["message"]


def order(value: str) -> str:
    return f'{{"task": {{"inline": {{"grammar": {{"propertyOrder": {value}}}}}}}}}'


LENIENT = [
    ('{"images": [{"data": "AA*A"}]}', "images[0].data is not base64"),
    ('{"images": [{"data": "AAAA===="}]}', "images[0].data is not base64"),
    ('{"images": [{"data": "A"}]}', "images[0].data is not base64"),
    ('{"images": [{"data": "A A="}]}', "images[0].data is not base64"),
    ('{"images": [{"data": "+-AA"}]}', "images[0].data is not base64"),
    ('{"images": [{"data": 5}]}', "images[0].data must be text in base64"),
    ('{"images": [[]]}', "images[0] must be an object"),
    ('{"images": {}}', "images must be a list"),
    (order("1.5"), "grammar.property_order must be one of: PROPERTY_ORDER_UNSPECIFIED"),
    (order("true"), "grammar.property_order must be one of"),
    (order("[]"), "grammar.property_order must be one of"),
    ('{"sampling": {"seed": "x"}}', "sampling.seed must be a whole number"),
    ('{"sampling": {"seed": "1_0"}}', "sampling.seed must be a whole number"),
    ('{"sampling": {"maxTokens": 1.5}}', "sampling.max_tokens must be a whole number"),
    ('{"sampling": {"maxTokens": true}}', "sampling.max_tokens must be a whole number"),
    ('{"sampling": {"temperature": []}}', "sampling.temperature must be a number"),
    ('{"sampling": {"temperature": "1_0"}}', "sampling.temperature must be a number"),
    ('{"task": {"name": "a", "inline": {}}}', "task takes only one of name and inline"),
    ('{"task": []}', "task must be an object"),
    ('{"task": {"inline": []}}', "task.inline must be an object"),
    ('{"task": ""}', "task must be an object"),
    ('{"sampling": false}', "sampling must be an object"),
    ('{"task": {"name": "\\ud800"}}', "surrogate"),
    ('{"task": {"name": "a"}} {}', "not JSON"),
    ('{"sampling": {"temperature": NaN}}', "NaN"),
]


async def test_what_protobuf_would_take_by_mistake_is_refused() -> None:
    async with serving() as server:
        for body, part in LENIENT:
            reply = await call(server, "RunTask", body.encode())
            assert (reply.status, reason(reply)) == (400, "MALFORMED_REQUEST"), body
            assert part in reply.json["message"], body


@pytest.mark.parametrize("kind", ["standard", "URL-safe", "without padding"])
def test_both_alphabets_of_base64_are_taken(kind: str) -> None:
    data = bytes(range(250)) + b"\xfb\xff"
    text = base64.b64encode(data) if kind == "standard" else base64.urlsafe_b64encode(data)
    if kind == "without padding":
        data, text = data + b"x", base64.urlsafe_b64encode(data + b"x").rstrip(b"=")
    given = {"images": [{"data": text.decode()}, {}], "task": {"name": "a"}}
    message = pb.RunTaskRequest()
    strict_json.parse(json.dumps(given).encode(), message)
    assert message == pb.RunTaskRequest(
        images=[pb.Image(data=data), pb.Image()], task=pb.Task(name="a")
    )


async def test_what_is_no_call_of_a_method() -> None:
    async with serving() as server:
        unknown = await call(server, "Nothing")
        get = await server.request("GET", f"{SERVICE}/GetModel")
        text = await call(server, "GetModel", b"{}", **{"content-type": "text/plain"})
        native = await call(server, "GetModel", b"", **{"content-type": "application/grpc"})
        stream = await call(server, "StreamTask", run())
    assert (unknown.status, get.status, get.headers["allow"]) == (404, 405, "POST")
    assert "ValidateSchema" in unknown.json["message"]
    assert {text.status, native.status, stream.status} == {415}
    assert "application/json" in text.json["message"]
    assert "gRPC port" in native.json["message"]
    assert "application/connect+json" in stream.json["message"]


async def test_a_body_that_is_too_large_or_late() -> None:
    async with serving(max_message_bytes=1_100_000, max_image_bytes=1000) as server:
        large = await call(server, "RunTask", run("a" * 1_200_000))
    async with serving(receive_timeout_s=0.3) as server:
        connection = await server.connect()
        await connection.send("POST", f"{SERVICE}/GetModel", b"{", {"content-length": "50"})
        late = await connection.reply()
        connection.close()
    assert (large.status, large.json["code"]) == (429, "resource_exhausted")
    assert "1100000" in large.json["message"]
    assert (late.status, reason(late)) == (504, "RECEIVE_TIMEOUT")


async def test_a_large_body_is_decoded_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    to_thread = asyncio.to_thread

    async def watched(function: Any, *arguments: Any) -> Any:
        threads.append(getattr(function, "__qualname__", ""))
        return await to_thread(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", watched)
    async with serving() as server:
        await call(server, "RunTask", run("a"))
        assert "_Body._message" not in threads
        await call(server, "RunTask", run("a" * connect.INLINE_BYTES))
    assert "_Body._message" in threads


async def test_a_defect_keeps_its_text(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine("one two")
    async with serving(engine) as server:
        engine.crash_after = 1
        reply = await call(server, "RunTask", run())
    assert reply.status >= 500
    assert "crash" not in reply.body.decode().lower().replace("crashed", "")
    assert "Traceback" not in reply.body.decode()
    assert reason(reply)


# Keys, phases, the end


async def test_the_key_is_checked_before_the_body_is_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    async with serving(api_keys_file=keys) as server:
        connection = await server.connect()
        await connection.send("POST", f"{SERVICE}/GetModel", b"{", {"content-length": "5000000"})
        refused = await connection.reply()
        connection.close()
        served = await call(server, "GetModel", authorization=f"Bearer {KEY}")
    assert (refused.status, reason(refused)) == (401, "API_KEY_MISSING")
    assert served.status == 200


async def test_the_phase_is_checked_before_the_body_is_read() -> None:
    async with serving(load=False) as server:
        reply = await call(server, "GetModel")
    assert (reply.status, reason(reply)) == (503, "ENGINE_LOADING")


async def test_the_deadline_of_the_caller_ends_the_call() -> None:
    engine = FakeEngine("one two")
    async with serving(engine) as server:
        engine.hang_after = 1
        reply = await call(server, "RunTask", run(), **{"connect-timeout-ms": "300"})
        await until(lambda: engine.active_requests == 0, 60)
    assert (reply.status, reply.json["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_the_slot_is_free_when_the_caller_leaves(method: str) -> None:
    engine = FakeEngine("one two three")
    streams = method == "StreamTask"
    body = framed(run()) if streams else json.dumps(run()).encode()
    async with serving(engine, max_concurrent=1) as server:
        engine.hang_after = 1
        connection = await server.connect()
        await connection.send("POST", f"{SERVICE}/{method}", body, STREAMED if streams else {})
        await until(lambda: engine.active_requests == 1, 60)
        connection.close()
        await until(lambda: engine.cancelled_requests == 1, 60)
        await until(lambda: server.runtime.budgets.admission.active == 0, 60)


async def test_a_drain_cuts_what_does_not_end() -> None:
    engine = FakeEngine("one two three")
    async with serving(engine) as server:
        engine.hang_after = 2
        whole = asyncio.create_task(call(server, "RunTask", run()))
        stream = asyncio.create_task(
            server.request("POST", f"{SERVICE}/StreamTask", framed(run()), STREAMED)
        )
        await until(lambda: engine.active_requests == 2, 60)
        await server.runtime.stop(0.1)
    assert ((await whole).status, reason(await whole)) == (503, "ENGINE_DRAINING")
    *_, (_, end) = frames((await stream).body)
    assert end["error"]["code"] == "unavailable"


async def test_calls_are_in_the_log_and_the_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.access")
    async with serving() as server:
        records: list[Any] = []
        server.runtime.observation.listeners.append(records.append)
        await call(server, "GetModel")
        await call(server, "RunTask", {"task": {"name": "nothing"}})
        await call(server, "Nothing")
    found = [(one.transport, one.method, one.code, one.reason) for one in records]
    assert found == [
        ("connect", "GetModel", "OK", "-"),
        ("connect", "RunTask", "NOT_FOUND", "UNKNOWN_TASK"),
        ("connect", "other", "UNIMPLEMENTED", "UNKNOWN_PATH"),
    ]
    lines = [one.message for one in caplog.records if one.name == "service.access"]
    assert f"method={SERVICE}/GetModel code=OK reason=-" in lines[0]
    assert len(lines) == 3


async def test_a_trace_goes_on() -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving() as server:
        server.runtime.observation.tracing = Traces(TracerProvider(shutdown_on_exit=False))
        traced = await call(server, "GetModel", traceparent=given)
        refused = await call(server, "RunTask", traceparent=given)
    for reply in (traced, refused):
        assert reply.headers["traceresponse"].startswith(given[:36])
        assert reply.headers["traceresponse"] != given


# Callers that do not read, and odd requests


@asynccontextmanager
async def not_reading(server: Serving) -> AsyncIterator[None]:
    """A stream whose caller reads nothing."""
    unread = small_buffers(server)
    unread.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(unread, ("127.0.0.1", server.http.port))
    body = framed({**run(), "sampling": {"maxTokens": 10**6}})
    head = (
        f"POST {SERVICE}/StreamTask HTTP/1.1\r\nhost: a\r\n"
        f"content-type: application/connect+json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    await loop.sock_sendall(unread, head.encode() + body)
    try:
        yield
    finally:
        unread.close()


async def test_a_drain_does_not_wait_for_a_reader_who_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.unread.STALL_S", 0.1)
    engine = FakeEngine(LONG, context_length=2_000_000)
    async with serving(engine) as server, not_reading(server):
        await until(lambda: engine.finished_requests > 1, 120)  # the warm-up, and this one
        assert server.runtime.lifecycle.calls_in_flight == 1
        await asyncio.wait_for(server.runtime.stop(200), 50)
        assert server.runtime.lifecycle.calls_in_flight == 0


async def test_a_reader_who_stops_is_dropped_after_the_time_of_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_s = 300.0  # far away, so that the engine does not end the call itself
    monkeypatch.setattr("service.unread.DROP_AFTER_S", 1.5 - limit_s)
    engine = FakeEngine(LONG, context_length=2_000_000)
    async with serving(engine, inference_timeout_s=limit_s, receive_timeout_s=limit_s) as server:
        records: list[Any] = []
        server.runtime.observation.listeners.append(records.append)
        async with not_reading(server):
            await until(lambda: bool(records), 60)
            await until(lambda: server.runtime.lifecycle.calls_in_flight == 0, 60)
        assert (records[0].code, records[0].reason) == ("DEADLINE_EXCEEDED", "NOT_READ")
        await until(lambda: engine.active_requests == 0)


async def test_a_drain_cuts_a_call_whose_body_is_still_arriving() -> None:
    async with serving() as server:
        connection = await server.connect()
        await connection.send("POST", f"{SERVICE}/GetModel", b"{}", {"content-length": "9"})
        await until(lambda: server.runtime.lifecycle.calls_in_flight == 1, 60)
        await server.runtime.stop(0.1)
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reason(reply)) == (503, "ENGINE_DRAINING")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("content-type: application/json\r\nx-a: \xff", 400),
        ("content-type: application/grpc\r\ncontent-type: application/json", 400),
        ("content-type: application/json\r\nconnect-timeout-ms: abc", 400),
        ("content-type: application/json\r\nconnect-timeout-ms: -5", 400),
    ],
)
async def test_headers_that_cannot_be_right(
    head: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as server:
        connection = await server.connect()
        text = f"POST {SERVICE}/GetModel HTTP/1.1\r\nhost: a\r\n{head}\r\ncontent-length: 2\r\n\r\n{{}}"
        await connection.write(text.encode("latin-1"))
        reply = await connection.reply()
        connection.close()
    assert reply.status == status
    assert reply.json["code"] == "invalid_argument"
    assert "codec" not in reply.json["message"]
    errors = [one for one in caplog.records if one.levelname == "ERROR"]
    assert [one for one in errors if not of_a_closed_loop(one)] == []


async def test_pages_may_send_the_headers_of_connect_where_they_are_allowed() -> None:
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,connect-protocol-version,x-grpc-web",
    }
    async with serving(http_origins="https://app.example") as server:
        preflight = await server.request("OPTIONS", f"{SERVICE}/GetModel", None, asked)
        call_ = await call(server, "GetModel", origin="https://app.example")
    assert preflight.status == 200
    assert "x-error-reason" in call_.headers["access-control-expose-headers"].lower()
