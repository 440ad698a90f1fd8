"""Servers of this project over gRPC that cannot be reached, break, lie or never end."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.client import read_error
from service.engines.remote import grpc_member
from service.errors import EngineUnavailable
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import (
    VisionServiceServicer,
    add_VisionServiceServicer_to_server,
)
from service.settings import Settings
from service.wiring import build_engines
from tests.service.certificates import Authority
from tests.service.engines.remote.serving import GOOD, question, remote
from tests.service.harness import ROOT, Running, failure, running, until

pytestmark = pytest.mark.slow

MODEL = "scripted"
Events = AsyncIterator[pb.StreamTaskResponse]


def piece(text: str) -> pb.StreamTaskResponse:
    return pb.StreamTaskResponse(delta=text)


def result(text: str = GOOD, model: str = MODEL) -> pb.StreamTaskResponse:
    usage = pb.Usage(prompt_tokens=3, output_tokens=5)
    return pb.StreamTaskResponse(
        result=pb.TaskResult(text=text, json=text, model=model, usage=usage)
    )


@dataclass
class Worker(VisionServiceServicer):  # type: ignore[misc]
    """A worker that answers message by message as a test says. script: gets the request's context."""

    script: Callable[[grpc.aio.ServicerContext], Events]
    port: int = 0
    asked: list[pb.StreamTaskRequest] = field(default_factory=list)

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        capabilities = pb.Capabilities(
            modalities=[pb.MODALITY_TEXT],
            context_length=4096,
            grammar_kinds=[pb.GRAMMAR_KIND_JSON_SCHEMA],
            sampling_options=["max_tokens", "temperature"],
        )
        return pb.GetModelResponse(name=MODEL, engine="reference", capabilities=capabilities)

    async def ValidateSchema(self, request: Any, context: Any) -> pb.ValidateSchemaResponse:
        return pb.ValidateSchemaResponse()

    async def StreamTask(self, request: Any, context: Any) -> Events:
        self.asked.append(request)
        async for event in self.script(context):
            yield event


async def good(context: Any) -> Events:
    yield piece(GOOD[:4])
    yield piece(GOOD[4:])
    yield result()


@asynccontextmanager
async def pair(
    script: Callable[[Any], Events], **settings: Any
) -> AsyncIterator[tuple[Running, Worker]]:
    """Our server, and behind it a scripted worker, which answers the warm-up well."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    worker = Worker(good)
    add_VisionServiceServicer_to_server(worker, server)
    state = health.aio.HealthServicer()
    await state.set(grpc_member.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    worker.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with running(remote(f"grpc://127.0.0.1:{worker.port}", **settings)) as front:
            worker.script = script
            worker.asked.clear()
            yield front, worker
    finally:
        await server.stop(0)


async def test_a_good_answer() -> None:
    async with pair(good) as (front, _):
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD


# Answers that cannot be used


async def no_result(context: Any) -> Events:
    yield piece(GOOD)


async def nothing(context: Any) -> Events:
    return
    yield


async def other_text(context: Any) -> Events:
    yield piece('{"count": 4')
    yield result()


async def other_model(context: Any) -> Events:
    yield result(model="another")


async def two_results(context: Any) -> Events:
    yield result()
    yield result()


async def text_after_the_result(context: Any) -> Events:
    yield result()
    yield piece("more")


async def a_huge_message(context: Any) -> Events:
    yield piece("x" * 3_000_000)


async def a_huge_result(context: Any) -> Events:
    yield result("x" * 3_000_000)


async def without_an_end(context: Any) -> Events:
    while True:
        yield piece("x" * 100_000)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (no_result, "incomplete"),
        (nothing, "incomplete"),
        (other_text, "content"),
        (other_model, "model"),
        (two_results, "content"),
        (text_after_the_result, "content"),
        (a_huge_message, "too_large"),
        (a_huge_result, "too_large"),
        (without_an_end, "too_large"),
    ],
)
async def test_an_answer_that_cannot_be_used(
    script: Callable[[Any], Events], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_member, "MAX_BODY_BYTES", 1_000_000)
    async with pair(script) as (front, worker):
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.reason, error.metadata["fault"]) == ("BACKEND_ANSWER_INVALID", fault)
    assert len(worker.asked) == 1, "it may have generated"


async def test_another_model_behind_the_url_between_two_calls() -> None:
    async with pair(good) as (front, worker):
        await front.stub.RunTask(question(), timeout=60)
        worker.script = other_model
        assert (await failure(front.stub.RunTask(question(), timeout=60))).metadata[
            "fault"
        ] == "model"
        worker.script = good
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD


# Errors without a reason, as a proxy or another server gives them


@pytest.mark.parametrize(
    ("code", "begun", "reason", "attempts"),
    [
        (grpc.StatusCode.INTERNAL, False, "BACKEND_FAILED", 1),
        (grpc.StatusCode.UNKNOWN, True, "BACKEND_FAILED", 1),
        (grpc.StatusCode.UNIMPLEMENTED, False, "BACKEND_FAILED", 1),
        (grpc.StatusCode.UNAUTHENTICATED, False, "BACKEND_FAILED", 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False, "BACKEND_REFUSED", 1),
        (grpc.StatusCode.UNAVAILABLE, False, "BACKEND_UNREACHABLE", 1),
        (grpc.StatusCode.UNAVAILABLE, True, "BACKEND_UNREACHABLE", 1),
        (grpc.StatusCode.OK, True, "BACKEND_ANSWER_INVALID", 1),
    ],
)
async def test_a_bare_status(
    code: grpc.StatusCode, begun: bool, reason: str, attempts: int
) -> None:
    async def script(context: Any) -> Events:
        if begun:
            yield piece("{")
        if code is not grpc.StatusCode.OK:
            await context.abort(code, "of a proxy, at http://10.0.0.7")

    async with pair(script) as (front, worker):
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert error.reason == reason
    assert "10.0.0.7" not in error.message
    assert len(worker.asked) == attempts


async def test_silence_within_an_answer_ends() -> None:
    gone = asyncio.Event()

    async def script(context: Any) -> Events:
        yield piece("{")
        try:
            await asyncio.sleep(600)
        finally:
            gone.set()

    async with pair(script, remote_silence_s=0.5) as (front, _):
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.reason == "ENGINE_STALLED"
        await asyncio.wait_for(gone.wait(), 60)


# What listens is no server of this project, or nothing listens


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def html(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>")
    await writer.drain()


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize("peer", [html, hangs_up, says_nothing])
async def test_no_grpc_server(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_member, "CHECK_LIMIT_S", 1.0)
    serving: list[asyncio.Future[Any]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.ensure_future(peer(reader, writer)))
        await asyncio.wait(serving[-1:])
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    engine = remote(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(EngineUnavailable, match="No model server can be used"):
        await asyncio.wait_for(engine.start(), 60)
    await engine.close()
    server.close()
    await asyncio.wait_for(asyncio.gather(*serving, return_exceptions=True), 60)
    await until(lambda: len(asyncio.all_tasks()) == 1, 60)


async def test_nothing_listens() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        engine = remote(f"grpc://127.0.0.1:{one.getsockname()[1]}")
        with pytest.raises(EngineUnavailable, match="No model server can be used"):
            await asyncio.wait_for(engine.start(), 60)
        await engine.close()


async def test_tls_that_is_not_trusted(tmp_path: Path) -> None:
    cert, key = Authority.create(tmp_path).issue("server")
    async with running(tls_cert=cert, tls_key=key) as back:
        engine = remote(f"grpcs://{back.address}", remote_start_s=600)
        with pytest.raises(EngineUnavailable):  # not after 600 seconds
            await asyncio.wait_for(engine.start(), 60)
        await engine.close()


# Two workers, one of which is killed


@contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A worker on the fake engine in a process of its own, and its port."""
    command = [sys.executable, "-m", "tests.service.serve_fake", "0", "0.004", "8"]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert started.stdout is not None
    try:
        yield started, int(started.stdout.readline())
    finally:
        started.kill()
        started.wait(60)
        started.stdout.close()


@pytest.mark.timeout(300)
async def test_one_of_two_workers_is_killed_under_load(tmp_path: Path) -> None:
    """No invalid answer, no hang, and errors only for requests that the killed worker had."""
    with process() as (doomed, first), process() as (_, second):
        path = tmp_path / "fleet.yaml"
        path.write_text(
            f"backends:\n  a: {{url: 'grpc://127.0.0.1:{first}'}}\n"
            f"  b: {{url: 'grpc://127.0.0.1:{second}'}}\n"
            "models:\n  vl: {backends: [a, b], model: fake}\n"
        )
        settings = Settings(engine="remote", remote_file=path, remote_start_s=60)  # type: ignore[call-arg]
        async with running(build_engines(settings)) as front:  # type: ignore[arg-type]
            outcomes: list[Any] = []

            async def caller() -> None:
                for _ in range(8):
                    try:
                        found = await front.stub.RunTask(question(schema=None), timeout=120)
                        outcomes.append(found.result.text)
                    except grpc.aio.AioRpcError as error:
                        outcomes.append(read_error(error))

            callers = [asyncio.ensure_future(caller()) for _ in range(12)]
            await until(lambda: len(outcomes) >= 24, 120)
            doomed.send_signal(signal.SIGKILL)
            await asyncio.wait_for(asyncio.gather(*callers), 200)
    failed = [one for one in outcomes if not isinstance(one, str)]
    assert len(outcomes) == 96
    assert len(failed) <= 12, "each caller had at most one request in the killed worker"
    assert {one.reason for one in failed} <= {"BACKEND_UNREACHABLE"}
    (text,) = {one for one in outcomes if isinstance(one, str)}
    assert text.split() == ["word"] * 8
