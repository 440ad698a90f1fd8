"""A model server of this machine that is found at the start."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from service.engines.remote.discovery import VLLM_MLX_ENDPOINT
from service.errors import EngineUnavailable
from service.settings import Settings
from service.wiring import build_engine
from tests.service.engines.remote.scripted import Scripted, saying, scripted
from tests.service.engines.remote.serving import question
from tests.service.harness import running

pytestmark = pytest.mark.slow


def finding(**settings: Any) -> Any:
    options: dict[str, Any] = {"remote_start_s": 0, **settings}
    return build_engine(Settings(engine="remote", remote_discover=True, **options))


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    if VLLM_MLX_ENDPOINT in os.environ:
        monkeypatch.delenv(VLLM_MLX_ENDPOINT)


def listen_on(monkeypatch: pytest.MonkeyPatch, *servers: Scripted) -> None:
    """Make the ports of these servers the usual ones."""
    ports = {int(one.url.rpartition(":")[2]): "a server" for one in servers}
    monkeypatch.setattr("service.engines.remote.discovery.LOCAL_PORTS", ports)


async def test_the_only_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(saying("Hello")) as back:
        listen_on(monkeypatch, back)
        async with running(finding()) as front:
            result = (await front.stub.RunTask(question(schema=None), timeout=60)).result
    assert (result.text, result.model) == ("Hello", "tiny-vl")
    assert all("authorization" not in one.headers for one in back.asked)


async def test_several_are_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(saying("a")) as one, scripted(saying("b")) as other:
        listen_on(monkeypatch, one, other)
        engine = finding(remote_start_s=60)
        with pytest.raises(EngineUnavailable) as raised:
            await asyncio.wait_for(engine.start(), 50)
        await engine.close()
    assert one.url in raised.value.message
    assert other.url in raised.value.message
    assert "remote_url" in raised.value.message


async def test_the_named_endpoint_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(saying("a")) as one, scripted(saying("named")) as other:
        listen_on(monkeypatch, one)
        monkeypatch.setenv(VLLM_MLX_ENDPOINT, f"{other.url}/v1")
        async with running(finding()) as front:
            result = (await front.stub.RunTask(question(schema=None), timeout=60)).result
    assert result.text == "named"


async def test_a_named_endpoint_that_is_silent_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    async with scripted(saying("a")) as one:
        listen_on(monkeypatch, one)
        monkeypatch.setenv(VLLM_MLX_ENDPOINT, f"http://127.0.0.1:{unused_tcp_port}")
        engine = finding()
        with pytest.raises(EngineUnavailable, match=VLLM_MLX_ENDPOINT):
            await engine.start()
        await engine.close()


async def test_a_server_that_comes_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(saying("Hello")) as back:
        listen_on(monkeypatch, back)
        await back.kill()
        engine = finding(remote_start_s=60)
        starting = asyncio.ensure_future(engine.start())
        await asyncio.sleep(0.5)
        assert not starting.done()
        await back.start()
        await asyncio.wait_for(starting, 60)
        assert engine.capabilities.model == "tiny-vl"
        await engine.close()


async def test_a_page_of_something_else_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def loading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": {"code": "ENGINE_LOADING"}}'
        writer.write(b"HTTP/1.1 503 X\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(loading, sock=listening)
        ports = {listening.getsockname()[1]: "this server, while it starts"}
        monkeypatch.setattr("service.engines.remote.discovery.LOCAL_PORTS", ports)
        engine = finding()
        with pytest.raises(EngineUnavailable, match="no model server answers"):
            await engine.start()
        await engine.close()
        server.close()
