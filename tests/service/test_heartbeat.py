"""An engine that fails, comes back, or does not."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc
import pytest

from service import heartbeat
from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.grpc_api.server import VisionServer, serve
from service.lifecycle import Phase
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.tasks.registry import load_registry
from service.types import Chunk, GenerateRequest
from service.wiring import BUNDLED_MODEL
from tests.service.harness import ROOT, Running, failure, inline, run_request, running, until


class Failing(FakeEngine):
    """Is unhealthy after a failed request until one succeeds, as the reference engine is."""

    broken = False
    probes = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.probes += request.request_id == "heartbeat"
        if self.broken:
            self.healthy = False
            raise EngineUnavailable("a step of the engine failed; try again")
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk
        self.healthy = True


def phase(started: Running) -> Phase:
    return started.server.lifecycle.phase


async def test_a_recovered_engine_serves_again() -> None:
    engine = Failing()
    async with running(engine, health_interval_s=0.02) as started:
        engine.broken = True
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        await until(lambda: phase(started) is Phase.UNHEALTHY)
        engine.broken = False
        await until(lambda: phase(started) is Phase.SERVING)
        assert (await started.stub.RunTask(run_request(), timeout=60)).result.text


@pytest.mark.slow  # loads the bundled model
async def test_a_recovered_reference_engine_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps fail, which counts as dead; the fourth works."""
    from service.engines.reference import ReferenceEngine
    from service.engines.reference.scheduler import Scheduler

    turn, failures = Scheduler.turn, 0

    def failing(scheduler: Scheduler) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("out of memory")
        turn(scheduler)

    monkeypatch.setattr(Scheduler, "turn", failing)
    engine: Any = ReferenceEngine(BUNDLED_MODEL)
    async with running(engine, health_interval_s=0.5) as started:
        for _ in range(3):
            failures = 1
            error = await failure(started.stub.RunTask(run_request(max_tokens=2), timeout=60))
            assert error.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(EngineUnavailable):
            await engine.check_health()
        await until(lambda: engine._worker._failures == 0)
        await until(lambda: phase(started) is Phase.SERVING)
        error = await failure(started.stub.RunTask(run_request(max_tokens=2), timeout=60))
        assert error.reason == "OUTPUT_TRUNCATED"


async def test_a_healthy_engine_is_not_probed() -> None:
    engine = Failing()
    async with running(engine, health_interval_s=0.01):
        await asyncio.sleep(0.2)
    assert engine.probes == 0


async def test_no_probe_while_a_call_is_in_the_engine() -> None:
    engine = Failing()
    async with running(engine, health_interval_s=0.02) as started:
        engine.hang_after = 0
        call = started.stub.RunTask(run_request())
        await until(lambda: engine.active_requests == 1)
        engine.healthy = False
        await until(lambda: phase(started) is Phase.UNHEALTHY)
        await asyncio.sleep(0.2)
        assert engine.probes == 0
        engine.hang_after = None
        call.cancel()
        await until(lambda: phase(started) is Phase.SERVING)
        assert engine.probes == 1


async def test_an_engine_whose_probe_hangs_stays_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PROBE_LIMIT_S", 0.05)
    engine = Failing()
    async with running(engine, health_interval_s=0.02) as started:
        engine.hang_after, engine.healthy = 0, False
        await until(lambda: engine.probes >= 3)
        assert phase(started) is Phase.UNHEALTHY
        assert engine.active_requests <= 1
        engine.hang_after = None
        await until(lambda: phase(started) is Phase.SERVING)


# The end


async def served(engine: FakeEngine, **settings: Any) -> tuple[VisionServer, asyncio.Task[None]]:
    """``serve`` in a task, and its server when it is ready."""
    ready: asyncio.Future[VisionServer] = asyncio.get_running_loop().create_future()
    registry = load_registry(None)
    running = serve(Settings(port=0, **settings), engine, registry, on_ready=ready.set_result)
    task = asyncio.create_task(running)
    return await ready, task


@pytest.mark.slow
async def test_serve_ends_if_the_engine_does_not_recover() -> None:
    engine = FakeEngine()
    _, task = await served(engine, health_interval_s=0.02, unhealthy_exit_s=0.2)
    engine.healthy = False
    with pytest.raises(EngineUnavailable, match=r"made no progress for 0\.2 s"):
        await asyncio.wait_for(task, 60)


@pytest.mark.slow
async def test_hanging_calls_do_not_delay_the_end_of_serve() -> None:
    engine = FakeEngine()
    server, task = await served(
        engine, health_interval_s=0.02, unhealthy_exit_s=0.2, drain_grace_s=600
    )
    engine.hang_after = 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        method = channel.unary_unary("/qwen3vl.v1.VisionService/RunTask")
        call = asyncio.ensure_future(failure(method(run_request().SerializeToString())))
        await until(lambda: engine.active_requests == 1)  # however slow the machine is
        engine.healthy = False
        with pytest.raises(EngineUnavailable, match="made no progress"):
            await asyncio.wait_for(task, 60)
        assert (await call).code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_an_engine_that_makes_progress_is_not_given_up() -> None:
    """It says that it is unhealthy, but tokens come: longer than the limit."""
    for exit_s in (2, 20):  # more time where the machine paused for longer than the limit
        engine = FakeEngine("word " * 60, token_delay_s=exit_s / 40)
        server, task = await served(engine, health_interval_s=0.02, unhealthy_exit_s=exit_s)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            method = channel.unary_stream("/qwen3vl.v1.VisionService/StreamTask")
            stream = method(pb.StreamTaskRequest(task=inline()).SerializeToString())
            pieces = 0
            with suppress(grpc.aio.AioRpcError):
                async for _ in stream:
                    pieces += 1
                    engine.healthy = False
        with pytest.raises(EngineUnavailable, match="made no progress"):
            await asyncio.wait_for(task, 60)
        if pieces > 60:
            break
    assert pieces > 60


BROKEN = """
import sys
from service.cli.serving import serve_command
from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable

async def check_health(self):
    raise EngineUnavailable("broken")

FakeEngine.check_health = check_health
limits = ["--health-interval-s", "0.05", "--unhealthy-exit-s", "0.2"]
sys.exit(serve_command(["--engine", "fake", "--port", "0", *limits]))
"""


@pytest.mark.slow  # a server of its own
def test_the_process_exits_with_a_code_if_the_engine_does_not_recover() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "qwen3vl serve: The engine was unhealthy and made no progress for 0.2 s."
    assert "Traceback" not in done.stderr


HANGING = """
import asyncio, threading
from service import runtime
from service.grpc_api import server
from service.engines.fake import FakeEngine
from service.settings import Settings
from service.tasks.registry import load_registry

class Hanging(FakeEngine):
    async def close(self):
        await asyncio.to_thread(threading.Event().wait)

runtime.CLOSE_LIMIT_S = runtime.EXIT_LIMIT_S = 0.2
ready = lambda server: print("ready", flush=True)
asyncio.run(server.serve(Settings(port=0), Hanging(), load_registry(None), on_ready=ready))
"""


@pytest.mark.slow
def test_endless_engine_threads_do_not_keep_the_process_alive() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 1
        finally:
            process.kill()


# Crashes in native code


@pytest.mark.slow  # loads the bundled model: its libraries bring handlers of their own
def test_a_crash_of_the_server_leaves_a_trace() -> None:
    """As plain text behind the lines of the log, which are JSON here: docs/operations.md says so."""
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                assert isinstance(json.loads(line), dict), line
                if "SERVING on" in line:
                    break
            process.send_signal(signal.SIGSEGV)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGSEGV
    before, begin, trace = log.partition("Fatal Python error: Segmentation fault\n")
    assert begin
    assert all(isinstance(json.loads(line), dict) for line in before.splitlines())
    assert "most recent call first" in trace
    assert re.search(r"^(Current thread|Thread) 0x", trace, re.MULTILINE)
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert "`Fatal Python error: `" in page


@pytest.mark.slow
def test_a_crash_of_a_grammar_worker_leaves_a_trace() -> None:
    command = [sys.executable, "-m", "service.structured_output.worker"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)  # it says that it is ready
            process.send_signal(signal.SIGSEGV)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert b"Fatal Python error: Segmentation fault" in log
