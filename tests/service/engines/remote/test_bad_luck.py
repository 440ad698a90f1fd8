"""Servers that cannot be reached, are busy, silent, endless or replaced; and callers that leave."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.engines.remote import wire
from service.engines.remote.http_member import retry_after_s
from service.errors import EngineUnavailable
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.ports import free_port
from tests.service.certificates import Authority
from tests.service.engines.remote.scripted import (
    Asked,
    completion,
    delta,
    head,
    saying,
    scripted,
)
from tests.service.engines.remote.serving import GOOD, in_front_of, pair, question, remote
from tests.service.harness import failure, until

pytestmark = pytest.mark.slow


async def test_connection_refused_at_the_start() -> None:
    engine = remote(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineUnavailable, match="No model server can be used"):
        await engine.start()
    await engine.close()


async def test_the_start_waits_for_a_server() -> None:
    async with scripted(saying("Hello")) as back:
        await back.kill()
        told: list[str] = []
        engine = remote(back.url, remote_start_s=60)
        engine._on_progress = told.append
        starting = asyncio.ensure_future(engine.start())
        await until(lambda: bool(told), 60)
        await back.start()
        await asyncio.wait_for(starting, 60)
        assert engine.capabilities.model == "tiny-vl"
        await engine.close()


async def test_connection_refused_in_a_call_is_tried_again() -> None:
    async with pair(saying(GOOD), remote_retries=10) as (front, back):
        await back.kill()
        call = asyncio.ensure_future(front.stub.RunTask(question(), timeout=60))
        await asyncio.sleep(0.15)
        await back.start()
        assert (await call).result.json == GOOD


async def test_connection_refused_for_good() -> None:
    async with pair(saying(GOOD), remote_retries=1) as (front, back):
        await back.kill()
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNREACHABLE")


def streamed() -> pb.StreamTaskRequest:
    asked = question()
    return pb.StreamTaskRequest(task=asked.task)


def server_tls(authority: Authority, *, asks_for_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server"))
    if asks_for_client:
        context.load_verify_locations(authority.cert)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def test_tls_that_is_not_trusted(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    async with scripted(saying("Hello"), tls=server_tls(authority)) as back:
        engine = remote(back.url, remote_start_s=60)
        begun = time.monotonic()
        with pytest.raises(EngineUnavailable):
            await engine.start()
        assert time.monotonic() - begun < 50, "another attempt would not help"
        await engine.close()


async def test_tls_with_a_ca_and_a_client_certificate(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    client = authority.issue("client")
    files: dict[str, Any] = {"remote_ca": authority.cert}
    mutual = {**files, "remote_cert": client[0], "remote_cert_key": client[1]}
    async with scripted(saying(GOOD), tls=server_tls(authority, asks_for_client=True)) as back:
        async with in_front_of(back, **mutual) as front:
            assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD
        engine = remote(back.url, **files)
        with pytest.raises(EngineUnavailable):
            await engine.start()
        await engine.close()


@pytest.mark.parametrize(("kind", "kept"), [("llama.cpp", False), ("vllm", True)])
async def test_no_request_on_a_connection_that_the_server_closes(kind: str, kept: bool) -> None:
    """llama.cpp says keep-alive, and closes after a stream."""
    async with pair(saying(GOOD), remote_kind=kind) as (front, back):
        for _ in range(3):
            events = [event async for event in front.stub.StreamTask(streamed(), timeout=60)]
            assert events[-1].result.json == GOOD
    assert all((one.headers.get("connection") != "close") is kept for one in back.asked)
    assert kept or len({id(one.writer) for one in back.asked}) == 3


async def test_llama_cpp_is_asked_for_a_whole_answer_where_nobody_reads_the_pieces() -> None:
    async with pair(saying(GOOD), remote_kind="llama.cpp", remote_silence_s=0.5) as (front, back):

        async def late(one: Asked) -> None:
            if not one.json["stream"]:
                await asyncio.sleep(1.5)  # longer than the silence that a stream may have
            await saying(GOOD)(one)

        back.chat = late
        assert (await front.stub.RunTask(question(), timeout=60)).result.text == GOOD
    assert [one.json["stream"] for one in back.asked] == [False]


async def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    async with scripted(saying(GOOD)) as back:
        connections = wire.Wire(back.url, wire.WireOptions())
        for _ in range(2):
            assert (await connections.fetch("GET", "/v1/models", limit_s=10)).status == 200
            session: Any = connections._opened()
            ((idle, _),) = next(iter(session.connector._conns.values()))
            # After the connection is chosen, before anything is written.
            asyncio.get_running_loop().call_soon(idle.transport.close)
            with pytest.raises(wire.Unreachable, match="closed the connection meanwhile"):
                await connections.fetch("POST", "/v1/models", b"{}", limit_s=10)
        assert len(back.paths) == 2, "nothing was sent"
        await connections.close()


async def test_429_with_retry_after_is_honoured() -> None:
    times: list[float] = []

    async def busy(asked: Asked) -> None:
        times.append(time.monotonic())
        if len(times) < 2:
            await asked.answer({"error": "busy"}, 429, **{"retry-after": "1"})
        else:
            await asked.answer(completion(GOOD))

    async with pair(busy) as (front, _):
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD
    assert times[1] - times[0] >= 1


async def test_429_that_asks_for_more_time_than_there_is() -> None:
    async def busy(asked: Asked) -> None:
        await asked.answer({"error": "busy"}, 429, **{"retry-after": "600"})

    async with pair(busy) as (front, back):
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert len(back.asked) == 1
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert error.retry_after_s == 600


@pytest.mark.parametrize("status", [429, 503])
async def test_attempts_are_bounded(status: int) -> None:
    async def busy(asked: Asked) -> None:
        await asked.answer({"error": "busy"}, status)

    async with pair(busy, remote_retries=2) as (front, back):
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert len(back.asked) == 3
    assert error.reason == {429: "OVERLOADED", 503: "BACKEND_UNREACHABLE"}[status]


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("-5", 0, 0),
        ("1e9", 3600, 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_forms_of_retry_after(value: str, low: float, high: float) -> None:
    found = retry_after_s(value)
    assert found is not None
    assert low <= found <= high


@pytest.mark.parametrize("value", [None, "soon", "nan", ""])
def test_no_retry_after(value: str | None) -> None:
    assert retry_after_s(value) is None


@pytest.mark.parametrize("begun", [False, True])
async def test_silence_ends(begun: bool) -> None:
    async def silent(asked: Asked) -> None:
        if begun:
            await asked.begin_stream()
            await asked.event(delta("{"))
        await asyncio.wait_for(asked.gone.wait(), 60)

    async with pair(silent, remote_silence_s=0.3) as (front, back):
        error = await failure(front.stub.RunTask(question(), timeout=60))
        await asyncio.wait_for(back.asked[0].gone.wait(), 60)  # the connection is closed
    assert error.reason == "ENGINE_STALLED"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_caller_that_leaves_closes_the_connection(begun: bool, stream: bool) -> None:
    async def endless(asked: Asked) -> None:
        assert asked.json["stream"] is stream
        if begun and stream:
            await asked.begin_stream()
            await asked.event(delta("{"))
        elif begun:
            lines = {"content-type": "application/json", "content-length": "1000"}
            await asked.raw(head(200, lines) + b'{"choices": [')
        await asyncio.wait_for(asked.gone.wait(), 60)

    async with pair(endless, remote_stream=stream) as (front, back):
        call = front.stub.RunTask(question(), timeout=60)
        waiting = asyncio.ensure_future(call.code())
        await until(lambda: bool(back.asked), 60)
        call.cancel()
        await asyncio.wait_for(back.asked[0].gone.wait(), 60)
        waiting.cancel()


async def test_a_body_of_a_gigabyte_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 1 << 20)
    sent = 0

    async def endless(asked: Asked) -> None:
        nonlocal sent
        await asked.raw(
            head(200, {"content-type": "application/json", "content-length": str(1 << 30)})
        )
        while sent < 1 << 30:
            await asked.raw(b" " * (1 << 16))
            sent += 1 << 16

    async with pair(endless) as (front, _):
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.reason, error.metadata["fault"]) == ("BACKEND_ANSWER_INVALID", "too_large")
    assert sent < 1 << 28


async def test_an_endless_stream_and_an_endless_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 4 << 20)

    async def events(asked: Asked) -> None:
        await asked.begin_stream()
        while True:
            await asked.event(delta("x" * 10_000))

    async def one_event(asked: Asked) -> None:
        await asked.begin_stream()
        while True:
            await asked.piece(b"data: " + b"x" * 10_000)

    for script in (events, one_event):
        async with pair(script) as (front, _):
            error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.metadata["fault"] == "too_large"


async def test_another_model_behind_the_url_between_two_calls() -> None:
    async with pair(saying(GOOD)) as (front, back):
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD
        back.chat, back.models = saying(GOOD, model="other-vl"), ["other-vl"]
        errors = [await failure(front.stub.RunTask(question(), timeout=60)) for _ in range(2)]
        assert errors[0].metadata["fault"] == "model"
        assert errors[1].reason == "BACKEND_FAILED", "it is not asked: it serves another model"
        back.chat, back.models = saying(GOOD), ["tiny-vl"]
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD


async def test_several_models_and_none_is_named() -> None:
    async with scripted(saying("Hello"), models=["a", "b"]) as back:
        engine = remote(back.url)
        with pytest.raises(EngineUnavailable, match="several models"):
            await engine.start()
        await engine.close()
        named = remote(back.url, remote_model="c")
        with pytest.raises(EngineUnavailable, match="model"):
            await named.start()
        await named.close()


async def test_the_server_ends_a_drain_without_waiting_for_a_silent_back_end() -> None:
    async def silent(asked: Asked) -> None:
        await asyncio.wait_for(asked.gone.wait(), 60)

    async with pair(silent) as (front, back):
        call = asyncio.ensure_future(failure(front.stub.RunTask(question(), timeout=60)))
        await until(lambda: bool(back.asked), 60)
        assert await front.server.stop(0.05)
        assert (await call).reason in ("ENGINE_DRAINING", "ENGINE_CLOSED")
        await asyncio.wait_for(back.asked[0].gone.wait(), 60)
