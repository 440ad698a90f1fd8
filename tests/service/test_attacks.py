"""Callers who mean harm, against the real server: the attacks of ``tests/attacks``, made small."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without a stub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engines.fake import FakeEngine
from service.grpc_api import codec, health, interceptors
from service.grpc_api import guard as grpc_guard
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import Chunk, GenerateRequest
from service.unread import DROP_AFTER_S, Answer
from tests.attacks import unread
from tests.attacks.bombs import bomb
from tests.attacks.http2 import Connection, message
from tests.service.harness import (
    Running,
    failure,
    image_bytes,
    inline,
    of_a_closed_loop,
    run_request,
    running,
    stream_failure,
    until,
)

pytestmark = pytest.mark.slow

RUN_TASK = b"/qwen3vl.v1.VisionService/RunTask"
STREAM_TASK = b"/qwen3vl.v1.VisionService/StreamTask"
REFLECTION = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CHECK = b"/grpc.health.v1.Health/Check"
WATCH = b"/grpc.health.v1.Health/Watch"
CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 1, 3, 4
UNIMPLEMENTED, UNAVAILABLE, UNAUTHENTICATED = 12, 14, 16


@contextlib.asynccontextmanager
async def connected(server: Running, window: int = 65_535) -> AsyncIterator[Connection]:
    connection = await Connection.open("127.0.0.1", server.server.port, window)
    try:
        yield connection
    finally:
        await connection.close()


async def ended(connection: Connection, stream: int, limit_s: float = 10.0) -> str:
    return await asyncio.wait_for(asyncio.shield(connection.ended[stream]), limit_s)


async def status(connection: Connection, stream: int) -> int:
    """The gRPC status that a call ended with."""
    await ended(connection, stream)
    value = connection.data[stream].partition(b"\x0bgrpc-status")[2]
    return int(value[1 : 1 + value[0]])


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"somebody:{hashlib.sha256(b'secret').hexdigest()}\n")
    return path


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The test fails where any logger has a record of an error at its end."""
    yield
    gc.collect()  # the error of a task that nobody awaited is written when the task is collected
    records = caplog.get_records("call")  # caplog.records are those of the teardown by now
    assert [
        r.getMessage() for r in records if r.levelno >= logging.ERROR and not of_a_closed_loop(r)
    ] == []


# Answers that nobody reads


LIMIT_S = 300.0
"""Time limit of calls, so far away that the engine ends none of them."""


@pytest.mark.slow
@pytest.mark.usefixtures("errors")
async def test_unread_streams_do_not_occupy_a_slot(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is free when the engine is done; the call is reset at its deadline."""
    caplog.set_level(logging.INFO, "service.access")
    deadlines: dict[Answer, tuple[float, Callable[[], object]]] = {}
    drop_in = Answer.drop_in

    def noted(answer: Answer, seconds: float, drop: Callable[[], object]) -> None:
        drop_in(answer, seconds, drop)
        deadlines[answer] = seconds, drop

    monkeypatch.setattr(Answer, "drop_in", noted)
    limits = {"inference_timeout_s": LIMIT_S, "receive_timeout_s": 2 * LIMIT_S}
    async with running(max_concurrent=2, max_queue=32, **limits) as started:
        connection, calls = await unread.open_unread("127.0.0.1", started.server.port, 16)
        admission = started.server.servicer.inference.admission
        finished = started.engine.finished_requests
        await until(lambda: started.engine.finished_requests == finished + 16)
        await until(lambda: admission.active == admission.waiting == 0)
        assert started.server.lifecycle.calls_in_flight == 16
        assert [seconds for seconds, _ in deadlines.values()] == [LIMIT_S] * 16
        monkeypatch.undo()
        assert (await started.stub.RunTask(run_request(), timeout=60)).result.text
        while deadlines:  # which would keep the calls
            answer, (_, drop) = deadlines.popitem()
            answer.drop_in(-DROP_AFTER_S, drop)
        del answer, drop
        assert {await status(connection, call) for call in calls} == {CANCELLED}
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        await connection.close()
    lines = [line for line in caplog.messages if "NOT_READ" in line]
    assert len(lines) == 16
    assert all("code=DEADLINE_EXCEEDED" in line for line in lines)


@pytest.mark.usefixtures("errors")
async def test_an_unread_answer_of_a_unary_call_is_dropped_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.unread.DROP_AFTER_S", 1.5 - LIMIT_S)
    limits = {"inference_timeout_s": LIMIT_S, "receive_timeout_s": LIMIT_S}
    async with running(**limits) as started, connected(started, 0) as connection:
        body = message(run_request().SerializeToString())
        call = connection.call(RUN_TASK, body)
        await until(lambda: started.server.lifecycle.calls_in_flight == 1)
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        await started.stub.RunTask(run_request(), timeout=60)  # grpcio keeps the newest call
        assert await status(connection, call) == CANCELLED


@pytest.mark.usefixtures("errors")
async def test_a_drain_does_not_wait_for_callers_who_do_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.unread.STALL_S", 0.3)
    async with running() as started:
        connection, _ = await unread.open_unread("127.0.0.1", started.server.port, 4)
        await connection_idle(started, 4)
        await asyncio.wait_for(started.server.stop(200), 30)
        await connection.close()


async def connection_idle(started: Running, calls: int) -> None:
    """Wait until all calls are there and the engine is done with them."""
    await until(lambda: started.server.lifecycle.calls_in_flight == calls)
    await until(lambda: started.engine.active_requests == 0)


async def test_a_drain_waits_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who is slow, but reads, gets everything; the engine is long done."""
    monkeypatch.setattr("service.unread.STALL_S", 30.0)
    engine = FakeEngine("word " * 60_000, context_length=10**6)
    async with running(engine) as started:
        request = pb.StreamTaskRequest(task=inline())
        request.sampling.max_tokens = 10**5
        call = started.stub.StreamTask(request, timeout=60)
        text = (await call.read()).delta
        stopping = asyncio.create_task(started.server.stop(60))
        await asyncio.sleep(0.5)
        while not (event := await call.read()).HasField("result"):
            text += event.delta
        assert text == event.result.text
        await stopping


async def test_a_watcher_that_does_not_read_does_not_block_others() -> None:
    async with running(health_interval_s=0.02) as started, connected(started, 0) as connection:
        connection.call(WATCH, message(b""))
        stub = health_pb2_grpc.HealthStub(started.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.sleep(0.2)
        started.engine.healthy = False
        seen = await asyncio.wait_for(watch.read(), 60)
        assert seen.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(started.server.stop(0), 60)


async def test_the_number_of_health_watchers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    async with running() as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            await watch.read()
        refused = stub.Watch(health_pb2.HealthCheckRequest())
        assert await asyncio.wait_for(refused.code(), 30) is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()
        servicer = started.server.front_end._health
        await until(lambda: servicer._watchers == 1, 60)
        again = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await again.read()).status == health_pb2.HealthCheckResponse.SERVING
        for watch in (watches[1], again):
            watch.cancel()


# Requests that are refused before they are read


@pytest.mark.parametrize("path", [RUN_TASK, STREAM_TASK, REFLECTION])
async def test_without_a_key_the_request_is_not_read(keys: Path, path: bytes) -> None:
    async with (
        running(api_keys_file=keys, compressed_requests=True) as started,
        connected(started) as connection,
    ):
        for extra in ((), ((b"x-api-key", b"guess"),)):
            call = connection.call(path, None, *extra)
            assert await status(connection, call) == UNAUTHENTICATED
        call = connection.call(path, message(bomb(1 << 20), compressed=True))
        assert await status(connection, call) == UNAUTHENTICATED


async def test_while_the_model_loads_requests_are_not_read() -> None:
    async with running(load=False) as started, connected(started) as connection:
        assert await status(connection, connection.call(RUN_TASK, None)) == UNAVAILABLE


async def test_a_compressed_request_is_refused_packed() -> None:
    async with running() as started, connected(started) as connection:
        for path in (RUN_TASK, CHECK):
            body = message(bomb(1 << 20), compressed=True)
            call = connection.call(path, body, (b"grpc-encoding", b"gzip"))
            assert await status(connection, call) == UNIMPLEMENTED


async def test_a_compressed_request_is_refused_for_its_key_first(keys: Path) -> None:
    """gRPC core would refuse it at once, and keep it until Python takes the call: a caller could send
    the next one before that."""
    async with running(api_keys_file=keys) as started, connected(started) as connection:
        body = message(bomb(1 << 20), compressed=True)
        call = connection.call(RUN_TASK, body, (b"grpc-encoding", b"gzip"))
        assert await status(connection, call) == UNAUTHENTICATED


async def test_requests_that_nobody_reads_are_limited_in_size(keys: Path) -> None:
    """However fast a caller without a key sends, a request may not be longer than read_ahead_bytes
    before the server reads it."""
    async with (
        running(api_keys_file=keys, read_ahead_bytes=20_000) as started,
        connected(started) as connection,
    ):
        for _ in range(20):
            calls = [connection.call(RUN_TASK, None) for _ in range(20)]
            body = message(bytes(200_000))
            await asyncio.gather(*(connection.send(call, body) for call in calls))
            assert {await status(connection, call) for call in calls} == {UNAUTHENTICATED}
            assert connection.initial_window == 20_000


@pytest.mark.parametrize("path", [RUN_TASK, STREAM_TASK, REFLECTION])
async def test_an_incomplete_request_times_out(path: bytes) -> None:
    async with running(receive_timeout_s=0.3) as started, connected(started) as connection:
        call = connection.call(path, None)
        await connection.send(call, message(bytes(1000), length=2000))
        assert await status(connection, call) == DEADLINE_EXCEEDED


async def test_a_request_without_a_message() -> None:
    async with running() as started, connected(started) as connection:
        assert await status(connection, connection.call(RUN_TASK, b"")) == INVALID_ARGUMENT


async def test_the_number_of_slow_health_checks_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "PROBE_RECEIVE_S", 60.0)
    async with running() as started, connected(started) as connection:
        calls = [connection.call(CHECK, None) for _ in range(20)]
        for call in calls:
            await connection.send(call, message(bytes(1000), length=2000))

        def left() -> int:
            return sum(not connection.ended[call].done() for call in calls)

        await until(lambda: left() <= interceptors.MAX_SLOW_PROBES)
        assert left() == interceptors.MAX_SLOW_PROBES
        stub = health_pb2_grpc.HealthStub(started.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)).status


@pytest.mark.usefixtures("errors")
async def test_health_methods_need_no_key(keys: Path) -> None:
    async with running(api_keys_file=keys) as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        found = (await stub.List(health_pb2.HealthListRequest(), timeout=60)).statuses
        serving = health_pb2.HealthCheckResponse.SERVING
        assert {name: one.status for name, one in found.items()} == {
            "": serving,
            "qwen3vl.v1.VisionService": serving,
        }


# Deadlines that race


# many calls that take their time
@pytest.mark.usefixtures("errors")
async def test_deadlines_of_callers_that_race_ours() -> None:
    engine = FakeEngine("word " * 20, token_delay_s=0.01)
    async with running(engine, inference_timeout_s=0.15, max_concurrent=256) as started:
        stream = pb.StreamTaskRequest(task=inline())
        for _ in range(4):
            calls: list[Any] = []
            for number in range(100):
                limit_s = 0.145 + 0.0001 * number
                calls.append(started.stub.RunTask(run_request(), timeout=limit_s).code())
                calls.append(started.stub.StreamTask(stream, timeout=limit_s).code())
            await asyncio.gather(*calls)


class Torn:
    """The context of a call whose caller is gone when the server writes: gRPC core raises, and has not
    cancelled the task of the call."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        self._context = context
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return self._raise if name == self._method else getattr(self._context, name)

    async def _raise(self, *arguments: object) -> None:
        raise cygrpc.ExecuteBatchError("Failed execute_batch: (<SendStatusFromServerOperation>,)")


@pytest.mark.usefixtures("errors")
@pytest.mark.parametrize(
    ("method", "torn"), [("RunTask", "abort"), ("StreamTask", "abort"), ("StreamTask", "write")]
)
async def test_a_caller_who_is_gone_at_the_write_is_no_error(
    method: str, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race above, without a race, and without the filter that keeps grpcio from writing the error
    of gRPC core to the log: the call ends as a cancelled one."""

    class TornCall(interceptors.Call):
        def __init__(self, interceptor: Any, rules: Any, context: Any) -> None:
            super().__init__(interceptor, rules, Torn(context, torn))  # type: ignore[arg-type]

    monkeypatch.setattr(interceptors, "Call", TornCall)
    grpc_guard.install()
    monkeypatch.setattr(logging.getLogger(cygrpc.__name__), "filters", [])
    task = pb.Task(name="no-such-task") if torn == "abort" else inline()
    async with running() as started:
        if method == "RunTask":
            call: Any = started.stub.RunTask(pb.RunTaskRequest(task=task), timeout=0.5)
        else:
            call = started.stub.StreamTask(pb.StreamTaskRequest(task=task), timeout=0.5)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was sent"
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        assert started.engine.active_requests == 0


def test_only_callers_who_are_gone_leave_no_line_of_grpcio() -> None:
    """The second line of defence: what grpcio itself writes to the log about such a call."""
    log = logging.getLogger(cygrpc.__name__)
    grpc_guard.install()

    def kept(error: Exception) -> bool:
        info = (type(error), error, None)
        record = log.makeRecord(log.name, logging.ERROR, "", 0, "Unexpected", (), info)
        return bool(log.filter(record))

    assert not kept(cygrpc.ExecuteBatchError("Failed"))
    assert kept(ValueError("a defect"))


# What a failed call leaves behind


class Watching(FakeEngine):
    """Holds what it makes of images while it works, and remembers it without keeping it."""

    images: list[weakref.ref[np.ndarray[Any, Any]]]

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        held = [await image.reduced(np.copy) for image in request.all_images]
        self.images += [weakref.ref(pixels) for pixels in held]
        async with contextlib.aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


@pytest.fixture
def no_collections() -> Iterator[None]:
    log = logging.getLogger("service.errors")
    log.disabled = True  # what pytest keeps of a record has the frames of its exception
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    log.disabled = False


async def let_fail(started: Running, kind: str) -> None:
    """One call with an image that fails, in the way of ``kind``."""
    engine, stub = started.engine, started.stub
    engine.crash_after = engine.hang_after = None
    limits: dict[str, Any] = {}
    task = inline()
    if kind == "crash":
        engine.crash_after = 1
    elif kind in ("hang", "cancel", "stream cancel"):
        engine.hang_after = 1
    elif kind == "truncated":
        limits = {"max_tokens": 1}
    elif kind == "context":
        limits = {"max_tokens": 32_768}
    elif kind == "invalid":
        engine.answer = "no JSON"
        task = inline(json_schema='{"type": "object", "maxProperties": 0}')
    request = run_request(task, [image_bytes(400, 300)], **limits)
    if kind.startswith("stream"):
        streamed = pb.StreamTaskRequest.FromString(request.SerializeToString())
        call = stub.StreamTask(streamed, timeout=60)
        if kind == "stream crash":
            engine.crash_after = 1
            await stream_failure(call)
            return
        await call.read()
    else:
        call = stub.RunTask(request, timeout=60)
    if kind.endswith("cancel"):
        await until(lambda: engine.active_requests == 1)
        call.cancel()
    assert await call.code() is not grpc.StatusCode.OK


@pytest.mark.parametrize(
    "kind",
    [
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("crash", "hang", "cancel", "truncated", "context", "stream crash")
        ),
        "invalid",
        "stream cancel",
    ],
)
@pytest.mark.usefixtures("no_collections")
async def test_no_image_of_a_failed_call_stays_in_memory(kind: str) -> None:
    engine = Watching()
    engine.images = []
    limit_s = 0.3 if kind == "hang" else 10.0
    async with running(engine, inference_timeout_s=limit_s) as started:
        for _ in range(3):
            await let_fail(started, kind)
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        assert engine.images
        await until(lambda: all(image() is None for image in engine.images))


@pytest.mark.parametrize(
    "data", [bytes(4_000_000), pytest.param(b"\xff" * 4_000_000, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("no_collections")
async def test_no_bytes_of_a_refused_request_stay_in_memory(data: bytes) -> None:
    """One that is not an image, and one that is not even a request."""
    request = run_request(images=[data]).SerializeToString() if data[0] == 0 else data
    body = message(request)
    process = psutil.Process()

    async def refused(times: int) -> None:
        async with connected(started) as connection:
            for _ in range(times):
                call = connection.call(RUN_TASK, None)
                await connection.send(call, body)
                connection.finish(call)
                assert await status(connection, call) == INVALID_ARGUMENT

    async with running() as started:
        await refused(5)
        before = process.memory_info().rss
        await refused(20)
        grown = process.memory_info().rss - before
    assert grown < 10 * len(data), f"{grown >> 20} MiB"


# Large messages


async def test_large_messages_are_parsed_and_decoded_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[tuple[str, str]] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any) -> Any:
            threads.append((name, threading.current_thread().name))
            return work(*arguments)

        return done

    monkeypatch.setattr(codec, "decode_run", noted("decode", codec.decode_run))
    tolerant = interceptors.tolerant
    monkeypatch.setattr(interceptors, "tolerant", lambda read: noted("parse", tolerant(read)))
    async with running() as started:
        await started.stub.RunTask(run_request(), timeout=30)
        here = threading.current_thread().name
        assert threads == [("parse", here), ("decode", here)]
        threads.clear()
        large = run_request(images=[bytes(1_000_000)])
        assert (await failure(started.stub.RunTask(large, timeout=30))).reason.startswith("IMAGE_")
    assert [name for name, _ in threads] == ["parse", "decode"]
    assert all(thread.startswith("large-message") for _, thread in threads)
