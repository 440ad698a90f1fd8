"""The server's life: loading, health, heartbeat, draining, signals."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.grpc_api.server import SERVICE, VisionServer, serve
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings, SettingsError
from service.tasks.registry import load_registry
from tests.service.harness import (
    Paced,
    failure,
    run_request,
    running,
    separate,
    stream_failure,
    until,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return (await stub.Check(request, timeout=60)).status


def stream(stub: VisionServiceStub) -> AsyncIterator[pb.StreamTaskResponse]:
    request = pb.StreamTaskRequest.FromString(run_request().SerializeToString())
    return aiter(stub.StreamTask(request, timeout=60))


# Loading


async def test_health_answers_and_calls_are_refused_while_the_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, go_on = FakeEngine(), asyncio.Event()
    start = engine.start

    async def late() -> None:
        await go_on.wait()
        await start()

    monkeypatch.setattr(engine, "start", late)
    async with running(engine, load=False) as started:
        loading = asyncio.create_task(started.server.load())
        assert await health(started.channel) == NOT_SERVING
        assert await health(started.channel, SERVICE) == NOT_SERVING
        for call in (
            started.stub.RunTask(run_request(), timeout=60),
            started.stub.GetModel(pb.GetModelRequest(), timeout=60),
        ):
            error = await failure(call)
            assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_LOADING")
        go_on.set()
        await loading
        assert await health(started.channel) == SERVING
        assert await health(started.channel, SERVICE) == SERVING


async def test_health_turns_serving_after_a_warm_up_generation() -> None:
    engine = FakeEngine()
    async with running(engine):
        assert engine.finished_requests == 1


async def test_health_of_an_unknown_service() -> None:
    async with running() as started:
        error = await failure(
            health_pb2_grpc.HealthStub(started.channel).Check(
                health_pb2.HealthCheckRequest(service="nobody"), timeout=60
            )
        )
        assert error.code is grpc.StatusCode.NOT_FOUND


async def test_an_engine_that_cannot_start_ends_serve() -> None:
    class Broken(FakeEngine):
        closed = False

        async def start(self) -> None:
            raise EngineUnavailable("The weights are not readable.", reason="ENGINE_BROKEN")

        async def close(self) -> None:
            self.closed = True

    engine = Broken()
    with pytest.raises(EngineUnavailable, match="weights"):
        await serve(Settings(port=0), engine, load_registry(None))
    assert engine.closed


async def test_a_taken_port_is_a_readable_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = VisionServer(Settings(port=port), FakeEngine(), load_registry(None))
        with pytest.raises(SettingsError, match=f"port: cannot listen on 127.0.0.1:{port}"):
            await server.start()
        await server.stop(0)


# Health while serving


async def test_watch_follows_the_engine() -> None:
    engine = FakeEngine()
    async with running(engine, load=False, health_interval_s=0.05) as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [(await watch.read()).status]
        await started.server.load()
        seen.append((await watch.read()).status)
        engine.healthy = False
        seen.append((await watch.read()).status)
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_UNHEALTHY")
        engine.healthy = True
        seen.append((await watch.read()).status)
        await started.stub.RunTask(run_request(), timeout=60)
        await started.server.stop(1)
        seen.append((await watch.read()).status)
        assert seen == [NOT_SERVING, SERVING, NOT_SERVING, SERVING, NOT_SERVING]


@pytest.mark.parametrize("kind", ["hangs", "crashes"])
async def test_a_health_check_that_does_not_answer(kind: str) -> None:
    stuck = asyncio.Event()

    class Stuck(FakeEngine):
        async def check_health(self) -> None:
            if not stuck.is_set():
                return
            if kind == "crashes":
                raise OSError("no such device")
            await asyncio.Event().wait()

    async with running(Stuck(), health_interval_s=0.02) as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stuck.set()
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_watchers_of_a_service_that_is_not_there_wait_for_it() -> None:
    async with running() as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert not watch.done()
        watch.cancel()


async def test_every_watcher_gets_every_change_and_may_disconnect() -> None:
    engine = FakeEngine()
    async with running(engine, health_interval_s=0.02) as started:
        stub = health_pb2_grpc.HealthStub(started.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(20)]
        assert {(await watch.read()).status for watch in watches} == {SERVING}
        for watch in watches[:10]:
            watch.cancel()
        engine.healthy = False
        assert {(await watch.read()).status for watch in watches[10:]} == {NOT_SERVING}
        engine.healthy = True
        assert {(await watch.read()).status for watch in watches[10:]} == {SERVING}


async def test_health_ticks_while_inference_is_pending() -> None:
    engine = FakeEngine()
    async with running(engine, max_concurrent=1, max_queue=1, health_interval_s=0.02) as started:
        engine.hang_after = 0
        calls = [asyncio.ensure_future(started.stub.RunTask(run_request())) for _ in range(2)]
        await until(lambda: started.server.servicer.inference.admission.waiting == 1)
        engine.healthy = False
        await until(lambda: started.server.lifecycle.phase.value == "unhealthy")
        assert await health(started.channel) == NOT_SERVING
        engine.healthy = True
        await until(lambda: started.server.lifecycle.phase.value == "serving")
        assert await health(started.channel) == SERVING
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


# Draining


async def test_calls_in_flight_finish_and_new_ones_are_refused() -> None:
    engine = Paced("one two three four")
    async with running(engine) as started:
        engine.go_on.clear()
        call = stream(started.stub)
        assert (await anext(call)).delta == "one"
        stopping = asyncio.create_task(started.server.stop(100))
        await until(lambda: started.server.lifecycle.phase.value == "draining")
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_DRAINING")
        engine.go_on.set()
        events = [event async for event in call]
        assert events[-1].result.text == "one two three four"
        await stopping


async def test_calls_after_the_grace_period_are_cancelled_with_a_reason() -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.hang_after = 1
        call = stream(started.stub)
        await anext(call)
        await started.server.stop(0.1)
        _, error = await stream_failure(call)
        assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_DRAINING")
        assert engine.active_requests == 0


async def test_stop_is_idempotent_and_needs_no_start() -> None:
    server = VisionServer(Settings(port=0), FakeEngine(), load_registry(None))
    await server.stop(0)
    await server.stop(0)


# Signals, in a process of their own


@asynccontextmanager
async def client(address: str) -> AsyncIterator[VisionServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield VisionServiceStub(channel)


@pytest.mark.slow  # a process of its own that drains
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_calls_finish(number: signal.Signals) -> None:
    with separate(grace_s=60, delay_s=0.2, pieces=16) as (server, address):
        async with client(address) as stub:
            running_stream = stream(stub)
            running_call = asyncio.ensure_future(stub.RunTask(run_request(), timeout=60))
            assert (await anext(running_stream)).delta == "word"
            server.send_signal(number)
            await until_draining(address)
            error = await failure(stub.RunTask(run_request(), timeout=60))
            assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_DRAINING")
            events = [event async for event in running_stream]
            assert events[-1].result.text == (await running_call).result.text
        assert await asyncio.to_thread(server.wait, 60) == 0


async def until_draining(address: str) -> None:
    """Wait until a process has handled a signal, without a call that it would wait for."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        async for found in stub.Watch(health_pb2.HealthCheckRequest()):
            if found.status == NOT_SERVING:
                return


@pytest.mark.slow  # a process of its own that drains
async def test_a_second_signal_ends_the_grace_period() -> None:
    with separate(grace_s=300, delay_s=0.5, pieces=600) as (server, address):
        async with client(address) as stub:
            running_stream = stream(stub)
            call = asyncio.ensure_future(failure(stub.RunTask(run_request(), timeout=300)))
            assert (await anext(running_stream)).delta == "word"
            server.send_signal(signal.SIGTERM)
            await until_draining(address)
            assert server.poll() is None
            server.send_signal(signal.SIGTERM)
            error = await call
            assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_DRAINING")
        assert await asyncio.to_thread(server.wait, 60) == 0, "before the grace period is over"


@pytest.mark.slow
def test_a_signal_without_calls_ends_the_process_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with separate(grace_s=60, delay_s=0, pieces=1, log=path) as (server, _):
        server.send_signal(signal.SIGTERM)
        assert server.wait(50) == 0
    log = path.read_text()
    assert "draining" in log
    assert "Traceback" not in log
