"""Two front ends on one runtime: gRPC, and one of lines over TCP that knows no gRPC."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable, UnknownModel
from service.grpc_api.server import GrpcFrontEnd
from service.inference.calls import Call, InlineTask
from service.lifecycle import Phase
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.runtime import Runtime, serve
from service.settings import Settings, SettingsError
from service.tasks.registry import load_registry
from service.types import Capabilities, Sampling
from tests.service.harness import ROOT, Paced, failure, run_request, until
from tests.service.line_front_end import LineFrontEnd, ask


@dataclass
class Both:
    """A runtime with two front ends; ``call`` goes through gRPC, ``line`` through the other."""

    runtime: Runtime
    engine: FakeEngine
    lines: LineFrontEnd
    channel: grpc.aio.Channel

    def call(self) -> Any:
        return VisionServiceStub(self.channel).RunTask(run_request(), timeout=60)

    def line(self) -> asyncio.Task[dict[str, Any]]:
        return asyncio.create_task(ask(self.lines.port, "Describe."))

    async def status(self) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)).status)


@asynccontextmanager
async def both(engine: FakeEngine, *, load: bool = True, **settings: Any) -> AsyncIterator[Both]:
    runtime = Runtime(Settings(port=0, **settings), [engine], load_registry(None))
    calls, lines = GrpcFrontEnd(runtime), LineFrontEnd(runtime)
    await runtime.start([calls, lines])
    try:
        if load:
            await runtime.load()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{calls.port}") as channel:
            yield Both(runtime, engine, lines, channel)
    finally:
        await runtime.stop(0)


async def test_both_answer() -> None:
    async with both(FakeEngine("a cat")) as started:
        assert (await started.call()).result.text == "a cat"
        assert await started.line() == {"text": "a cat", "model": "fake"}


async def test_both_are_told_of_every_phase() -> None:
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    async with both(FakeEngine(), load=False, health_interval_s=0.02) as started:
        phases = started.lines.phases
        assert (phases, await started.status()) == ([Phase.LOADING], not_serving)
        assert await started.line() == {"error": "ENGINE_LOADING"}
        await started.runtime.load()
        assert (phases[1:], await started.status()) == ([Phase.SERVING], serving)
        started.engine.healthy = False
        await until(lambda: len(phases) == 3)
        assert (phases[2:], await started.status()) == ([Phase.UNHEALTHY], not_serving)
        assert await started.line() == {"error": "ENGINE_UNHEALTHY"}
        started.engine.healthy = True
        await until(lambda: len(phases) == 4)
        assert (phases[3:], await started.status()) == ([Phase.SERVING], serving)
        await started.runtime.stop(0)
        assert phases[4:] == [Phase.DRAINING]


@pytest.mark.parametrize("first", ["call", "line"])
async def test_a_slot_that_one_has_taken_is_missing_to_the_other(first: str) -> None:
    async with both(FakeEngine(), max_concurrent=1, max_queue=0) as started:
        started.engine.hang_after = 0
        taken = asyncio.ensure_future(getattr(started, first)())
        await until(lambda: started.runtime.budgets.admission.active == 1)
        if first == "line":
            assert (await failure(started.call())).reason == "OVERLOADED"
        else:
            assert await started.line() == {"error": "OVERLOADED"}
        taken.cancel()


async def test_a_drain_waits_for_the_calls_of_both() -> None:
    engine = Paced("one two three")
    async with both(engine) as started:
        engine.go_on.clear()
        calls = asyncio.ensure_future(started.call()), started.line()
        await until(lambda: started.runtime.lifecycle.calls_in_flight == 2)
        stopping = asyncio.create_task(started.runtime.stop(100))
        await until(lambda: started.runtime.lifecycle.phase is Phase.DRAINING)
        assert (await failure(started.call())).reason == "ENGINE_DRAINING"
        assert await started.line() == {"error": "ENGINE_DRAINING"}
        engine.go_on.set()
        call, line = await asyncio.gather(*calls)
        assert call.result.text == line["text"] == "one two three"
        assert await stopping
        with pytest.raises(OSError, match="Connect call failed"):
            await started.line()


async def test_the_end_of_the_grace_cuts_the_calls_of_both() -> None:
    async with both(FakeEngine()) as started:
        started.engine.hang_after = 0
        call, line = asyncio.ensure_future(failure(started.call())), started.line()
        await until(lambda: started.runtime.lifecycle.calls_in_flight == 2)
        await started.runtime.stop(0.1)
        assert (await call).reason == "ENGINE_DRAINING"
        assert await line == {"error": "ENGINE_DRAINING"}
        assert started.engine.active_requests == 0


class Closing(FakeEngine):
    closed = False

    async def close(self) -> None:
        self.closed = True
        await super().close()


@pytest.mark.slow
async def test_a_front_end_that_breaks_ends_serve_and_the_other() -> None:
    engine = Closing()
    runtime = Runtime(Settings(port=0), [engine], load_registry(None))
    calls, lines = GrpcFrontEnd(runtime), LineFrontEnd(runtime)
    with pytest.raises(RuntimeError, match="the line front end broke"):
        await asyncio.wait_for(serve(runtime, [lines, calls], on_ready=lines.broken.set), 60)
    assert lines.phases == [Phase.LOADING, Phase.SERVING, Phase.DRAINING]
    assert engine.closed
    async with grpc.aio.insecure_channel(f"127.0.0.1:{calls.port}") as channel:
        error = await failure(VisionServiceStub(channel).RunTask(run_request(), timeout=60))
        assert error.code is grpc.StatusCode.UNAVAILABLE


async def test_a_front_end_that_cannot_listen_or_stop_holds_up_nobody() -> None:
    class Bad(LineFrontEnd):
        async def start(self) -> None:
            raise SettingsError("port: taken")

        async def stop(self) -> None:
            raise OSError("cannot stop")

    engine = Closing()
    runtime = Runtime(Settings(port=0), [engine], load_registry(None))
    lines = LineFrontEnd(runtime)
    with pytest.raises(SettingsError, match="port: taken"):
        await serve(runtime, [Bad(runtime), lines])
    assert engine.closed


@pytest.mark.slow
def test_a_server_without_grpc_never_imports_it() -> None:
    command = [sys.executable, "-m", "tests.service.line_front_end"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            assert asyncio.run(ask(port, "Hello"))["text"] == "an answer"
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60)[0] == "False\n"
        finally:
            process.kill()
    assert process.returncode == 0


# Several engines


class Named(FakeEngine):
    name = ""

    @property
    def capabilities(self) -> Capabilities:
        found = super().capabilities
        values = {name: getattr(found, name) for name in found.__slots__}
        return Capabilities(**{**values, "model": self.name})


def named(*names: str) -> list[FakeEngine]:
    engines: list[FakeEngine] = []
    for name in names:
        engine = Named(f"of {name}")
        engine.name = name
        engines.append(engine)
    return engines


async def test_engines_are_found_by_the_name_of_their_model() -> None:
    engines = named("small", "large")
    runtime = Runtime(Settings(health_interval_s=0.02), engines, load_registry(None))
    lines = LineFrontEnd(runtime)
    await runtime.start([lines])
    try:
        await runtime.load()
        assert list(runtime.models) == ["small", "large"]
        assert runtime.inference_for() is runtime.inference_for("small")
        large = runtime.inference_for("large")
        assert large.capabilities.model == "large"
        assert large.admission is runtime.inference_for("small").admission, "limits of the server"
        with pytest.raises(UnknownModel, match=r"Served: large, small"):
            runtime.inference_for("huge")
    finally:
        await runtime.stop(0)
    for engine in engines:
        with pytest.raises(EngineUnavailable):
            await engine.check_health()


async def test_an_unhealthy_engine_refuses_its_own_calls_and_no_others() -> None:
    small, large = named("small", "large")
    runtime = Runtime(Settings(health_interval_s=0.02), [small, large], load_registry(None))
    lines = LineFrontEnd(runtime)
    await runtime.start([lines])
    try:
        await runtime.load()
        call = Call(InlineTask("", "Hello", None), (), Sampling())
        large.healthy = False
        await until(lambda: runtime.inference_for("large").refusal is not None)
        assert runtime.lifecycle.phase is Phase.SERVING
        assert (await runtime.inference_for("small").answer(call, None)).text == "of small"
        with pytest.raises(EngineUnavailable) as caught:
            await runtime.inference_for("large").answer(call, None)
        assert caught.value.reason == "ENGINE_UNHEALTHY"
        small.healthy = False
        await until(lambda: runtime.lifecycle.phase is Phase.UNHEALTHY)
        large.healthy = True
        await until(lambda: runtime.lifecycle.phase is Phase.SERVING)
        assert (await runtime.inference_for("large").answer(call, None)).text == "of large"
        assert lines.phases[1:] == [Phase.SERVING, Phase.UNHEALTHY, Phase.SERVING]
    finally:
        await runtime.stop(0)


async def test_an_engine_is_tried_again_while_another_one_is_busy() -> None:
    small, large = named("small", "large")
    runtime = Runtime(Settings(health_interval_s=0.02), [small, large], load_registry(None))
    await runtime.start([])
    try:
        await runtime.load()
        small.hang_after = 0
        call = Call(InlineTask("", "Hello", None), (), Sampling())
        busy = asyncio.create_task(runtime.inference_for("small").answer(call, None))
        await until(lambda: small.active_requests == 1)
        large.healthy = False
        await until(lambda: runtime.inference_for("large").refusal is not None)
        large.healthy = True
        await until(lambda: runtime.inference_for("large").refusal is None)
        busy.cancel()
    finally:
        await runtime.stop(0)


async def test_two_engines_with_one_name_are_refused() -> None:
    runtime = Runtime(Settings(), named("same", "same"), load_registry(None))
    await runtime.start([])
    try:
        with pytest.raises(ValueError, match="two engines have a model of the same name: same"):
            await runtime.load()
    finally:
        await runtime.stop(0)
