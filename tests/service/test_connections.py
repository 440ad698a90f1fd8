"""Connections: how many and how long, and what the log says when they run out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.grpc_api import connections
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings
from tests.service.harness import failure, inline, run_request, running, separate, until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
"""How a client of HTTP/2 begins, with empty settings."""


@contextlib.asynccontextmanager
async def connected(port: int, times: int, begin: bytes = b"") -> AsyncIterator[list[Any]]:
    """So many TCP connections, as the streams that read from them."""
    pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(times)]
    for _, writer in pairs:
        writer.write(begin)
    try:
        yield [reader for reader, _ in pairs]
    finally:
        for _, writer in pairs:
            writer.close()


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What the server sent until it closed the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := await asyncio.wait_for(reader.read(4096), 60):
            found += part
    return found


async def called(port: int) -> pb.GetModelResponse:
    """A call over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub: Any = VisionServiceStub(channel)
        return await stub.GetModel(pb.GetModelRequest(), timeout=60)


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with running(max_connections=3) as started:
        port = started.server.port
        await started.stub.GetModel(pb.GetModelRequest(), timeout=60)  # the first connection
        async with connected(port, 2, PREFACE) as kept:
            assert [await one.readexactly(9) for one in kept]  # the server's settings
            async with connected(port, 1, PREFACE) as [refused]:
                assert await closed(refused) == b""
            assert (await failure(called(port))).code is grpc.StatusCode.UNAVAILABLE
            assert await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        await until_called(port)


async def until_called(port: int) -> None:
    """Wait until the server has noticed that connections were closed."""
    for _ in range(600):
        with contextlib.suppress(grpc.aio.AioRpcError):
            await called(port)
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no connection became free")


async def test_streams_of_a_connection_beyond_the_limit_wait() -> None:
    async with running(max_streams=2) as started:
        await started.stub.GetModel(pb.GetModelRequest(), timeout=60)  # the limit has arrived
        started.engine.hang_after = 0
        calls = [started.stub.RunTask(run_request(), timeout=60) for _ in range(3)]
        await until(lambda: started.engine.active_requests == 2, 60)
        await called(started.server.port)  # other connections have streams of their own
        assert started.engine.active_requests == 2
        started.engine.hang_after = None  # for calls that are yet to begin
        calls[0].cancel()
        assert (await calls[2]).result.text
        calls[1].cancel()


async def test_connections_without_calls_are_closed() -> None:
    async with running(max_connection_idle_s=0.2) as started:
        async with connected(started.server.port, 1, PREFACE) as [idle]:
            assert (await closed(idle)).endswith(b"connection idle")
        assert await started.stub.GetModel(pb.GetModelRequest(), timeout=60)


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_S", 0.2)
    async with running() as started, connected(started.server.port, 1) as [silent]:
        assert b"Did not receive HTTP/2 settings" in await closed(silent)


@pytest.mark.slow
async def test_old_connections_are_given_up_and_their_calls_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.0)
    async with running(max_connection_age_s=0.3, inference_timeout_s=2) as started:
        health = health_pb2_grpc.HealthStub(started.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert await watch.read()
        for _ in range(20):
            await started.stub.RunTask(run_request(inline()), timeout=60)
            await asyncio.sleep(0.05)
        # An endless call keeps the old connection until the time of every other call is over.
        with pytest.raises(grpc.aio.AioRpcError, match="max connection age"):
            await asyncio.wait_for(watch.read(), 60)


async def test_never() -> None:
    settings = Settings(max_connection_idle_s=0, max_connection_age_s=0)
    names = [name for name, _ in connections.connection_options(settings, 10)]
    assert not [name for name in names if "idle" in name or "age" in name.split("_")]


# File descriptors


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A limit of file descriptors, and how many are open, as the system would tell."""
    told = {"limit": 1024, "open": 24}
    limit = lambda _: (told["limit"], told["limit"])  # noqa: E731
    monkeypatch.setattr(connections.resource, "getrlimit", limit)
    monkeypatch.setattr(connections, "open_descriptors", lambda: told["open"])
    return told


def test_the_limit_on_connections_leaves_descriptors_for_the_rest(
    descriptors: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    assert connections.connection_limit(Settings(compile_workers=2)) == 1024 - 24 - 16 - 8
    assert connections.connection_limit(Settings(max_connections=100)) == 100
    assert not caplog.messages
    assert connections.connection_limit(Settings(max_connections=5000)) == 976
    [line] = caplog.messages
    assert "ulimit -n" in line
    assert line.endswith("connections=976 file_descriptors=1024")
    descriptors["limit"] = 64
    assert connections.connection_limit(Settings()) == 64 - 24 - 16 - 8
    assert caplog.messages[-1].endswith("connections=16 file_descriptors=64")
    descriptors["limit"] = resource.RLIM_INFINITY
    assert connections.connection_limit(Settings()) > 60_000


async def test_the_log_says_when_connections_run_out_and_when_they_are_free_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "CHECK_INTERVAL_S", 0.02)
    caplog.set_level(logging.INFO, connections.log.name)
    async with running(max_connections=40) as started:

        def said(text: str) -> int:
            return sum(text in message for message in caplog.messages)

        # The test holds one descriptor of each connection, and the server the other one.
        async with connected(started.server.port, 30, PREFACE):
            await until(lambda: said("nearly all connections are taken") == 1, 60)
        await until(lambda: said("connections are free again") == 1, 60)
        assert said("nearly all connections are taken") == 1


@pytest.mark.slow  # a server of its own
async def test_a_server_with_few_descriptors_and_many_idle_connections(tmp_path: Path) -> None:
    """120 connections on 64 descriptors: a caller waited for ever, and the log said nothing."""
    log = tmp_path / "log"
    with separate(grace_s=1, delay_s=0, pieces=3, log=log, descriptors=64) as (server, address):
        port = int(address.rpartition(":")[2])
        async with connected(port, 120, PREFACE):
            error = await failure(called(port))
            assert error.code is grpc.StatusCode.UNAVAILABLE
            await until(lambda: "nearly all connections are taken" in log.read_text(), 60)
        await until_called(port)
        server.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 60) == 0
    text = log.read_text()
    assert "few connections are possible; raise the limit of file descriptors" in text
    assert "file_descriptors=64" in text
